# SPDX-License-Identifier: Apache-2.0
"""The card beside what is saved, a `README.md`: ours to write anew, unless somebody has made it their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import GeneratorConfigError, did_you_mean


# A card with this line is ours to write anew; whoever edits a card takes the line out and keeps the text.
GENERATED_MARK = "<!-- Written by peft_dnd at every save. Remove this line to keep your own text. -->"
CARD_NAME = "README.md"
# What a card's snippet names where it is not known yet under which name it will be found.
PLACE = "path-or-hub-id"

# What only its author can say of a generator; the rest of a card's metadata is known.
_AUTHORS_METADATA = ("license", "license_name", "license_link", "datasets", "language", "tags")
# PEFT's task type -> the class of transformers that loads such a base.
AUTO_CLASSES = {
    None: "AutoModelForCausalLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no card yet, or one that is still as we wrote it."""
    card = folder / CARD_NAME
    return not card.is_file() or GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")


def check_card_metadata(data: Any) -> dict[str, Any]:
    """What an author says of a generator, for the head of its card, checked.

    Args:
        data: `license` (with `license_name` and `license_link` if it is none of the Hub's), `datasets`, `language`,
            `tags`; the last three may be lists.

    Raises:
        GeneratorConfigError: If there is something else in it, or a value is neither a string nor a list of strings.
    """
    if not isinstance(data, Mapping):
        raise GeneratorConfigError(f"card_metadata must be a dictionary, got {data!r}.")
    for name, value in data.items():
        if name not in _AUTHORS_METADATA:
            meant = did_you_mean(str(name), _AUTHORS_METADATA) or f" Known: {', '.join(_AUTHORS_METADATA)}."
            raise GeneratorConfigError(f"card_metadata has no entry {name!r}.{meant}")
        values = value if isinstance(value, list | tuple) and name in ("datasets", "language", "tags") else [value]
        if not all(isinstance(one, str) and one for one in values):
            raise GeneratorConfigError(
                f"card_metadata[{name!r}] must be a string or a list of strings, got {value!r}."
            )
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def loading_the_base(base: str, revision: str | None, task_type: str | None) -> tuple[str, str]:
    """Two lines of Python for a card's snippet: the import, and what loads the base model into `base_model`.

    >>> loading_the_base("org/base", None, "CAUSAL_LM")[1]
    'base_model = AutoModelForCausalLM.from_pretrained("org/base")'
    """
    kind = AUTO_CLASSES.get(task_type, "AutoModel")
    at = f', revision="{revision}"' if revision else ""
    return f"from transformers import {kind}", f'base_model = {kind}.from_pretrained("{base}"{at})'
