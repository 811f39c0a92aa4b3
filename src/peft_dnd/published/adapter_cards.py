# SPDX-License-Identifier: Apache-2.0
"""Texts in place of prompts, from the model card of an adapter that somebody published."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..errors import CorruptFileError, PromptError


# What PEFT's own template says of any adapter, and of what is not filled in.
_SAYS_NOTHING = re.compile(
    r"More Information Needed|Model Card (for|Authors|Contact)|Framework versions|^PEFT \d|provide a quick summary|"
    r"See \[?the documentation|Use the code below|^- +\S+:? ?\d+(\.\d+)+\S*$|Machine Learning Impact calculator|"
    r"This modelcard aims to be a base template|Users \(both direct and downstream\) should be made aware",
    re.IGNORECASE,
)
_NO_PROSE = re.compile(r"<!--.*?-->|^(`{3,}|~{3,}).*?^\1.*?$", re.DOTALL | re.MULTILINE)
_FEWEST_WORDS = 4


def texts_of_card(path: Path, source: str) -> tuple[str, ...]:
    """Read off a model card what its adapter is for: the inputs of its `widget`, otherwise its paragraphs.

    Left out are headings, code, tables, pictures, what PEFT's template says of every adapter, and what has fewer than
    four words.

    Args:
        path: The `README.md`.
        source: What to call the adapter in errors.

    Returns:
        The texts, in the card's order, each once.

    Raises:
        PromptError: If there is no card, or nothing in it says what the adapter is for.
        CorruptFileError: If it cannot be read.
    """
    if not path.is_file():
        raise PromptError(f"{source} has no card to take texts from. Give the task's prompts.")
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        widgets = card.data.to_dict().get("widget")
        texts = list(_of_widgets(widgets)) or list(_paragraphs(card.text))
    except (UnicodeDecodeError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise CorruptFileError(
            f"{str(path)!r} is no readable model card ({type(error).__name__}). Mend it, or give the task's prompts."
        ) from error
    if not texts:
        raise PromptError(
            f"The card of {source} says nothing of what the adapter is for: it has no widget, and no paragraph of its "
            "own. Give the task's prompts."
        )
    return tuple(dict.fromkeys(texts))


def _of_widgets(widgets: Any) -> Iterator[str]:
    for widget in widgets if isinstance(widgets, list) else []:
        if not isinstance(widget, dict):
            continue
        text = widget.get("text")
        messages = widget.get("messages")
        if text is None and isinstance(messages, list):
            said = [message.get("content") for message in messages if isinstance(message, dict)]
            text = "\n".join(part for part in said if isinstance(part, str))
        if isinstance(text, str) and text.strip():
            yield text.strip()


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", _NO_PROSE.sub("\n\n", text.replace("\r\n", "\n"))):
        lines = [line.strip() for line in block.splitlines()]
        kept = [line for line in lines if line and line[0] not in "#|!<" and not _SAYS_NOTHING.search(line)]
        paragraph = " ".join(kept)
        if len(re.findall(r"\w+", paragraph)) >= _FEWEST_WORDS:
            yield paragraph
