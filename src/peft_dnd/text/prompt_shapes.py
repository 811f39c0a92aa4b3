# SPDX-License-Identifier: Apache-2.0
"""The shapes in which people have prompts: chat messages, rows and columns of data sets and tables; to plain strings.

What is no shape known here is handed back as it is, for the caller to refuse in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..errors import PromptError, PromptTypeError, did_you_mean


Message: TypeAlias = Mapping[str, Any]
# Makes one text of a conversation.
Render: TypeAlias = Callable[[list[dict[str, Any]]], str]

# TRL's prompt-only data sets have this column.
PROMPT_COLUMN = "prompt"


class Table(Protocol):
    """What has columns by name: a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        """The columns' names."""
        ...

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def __getitem__(self, key: Any, /) -> Any:
        """A column by its name, or a row by its number."""
        ...


# One prompt each: strings, conversations, or rows with a prompt; or a table with a column of these.
PromptsLike: TypeAlias = Sequence[str] | Sequence[Sequence[Message]] | Sequence[Mapping[str, Any]] | Table


def column_of(prompts: Any, column: str | None, what: str) -> Any:
    """One column of a table, by name; anything else as it is.

    Args:
        prompts: A `datasets.Dataset`, a pandas DataFrame, or no table.
        column: The column; `None` takes `"prompt"` where there is one.
        what: What the error messages call the prompts.

    Raises:
        PromptTypeError: If there is no such column.
    """
    # A DataFrame's columns are an index of names, that of a Series or an array there is none of.
    names = getattr(prompts, "column_names", None)
    if names is None and getattr(prompts, "ndim", 1) == 2 and hasattr(prompts, "columns"):
        names = list(prompts.columns)
    if not isinstance(names, list):
        return prompts
    wanted = PROMPT_COLUMN if column is None else column
    if wanted not in names:
        kind = type(prompts).__name__
        raise PromptTypeError(
            f"{what} must be a list of strings, and this {kind} has no column {wanted!r}; it has "
            f"{', '.join(map(repr, names)) or 'none'}.{did_you_mean(wanted, names)} Pass one column of it: "
            "prompts=data['question'], or peft_dnd.text.prompt_texts(data, column='question')."
        )
    return prompts[wanted]


def text_of(
    prompt: Any, name: str, *, column: str | None = None, render: Render | None = None, are_answers: bool = False
) -> Any:
    """The text of one prompt.

    Args:
        prompt: A string; a conversation, which is a list of messages `{"role": ..., "content": ...}`; or a row, which
            is a dictionary with one of both under the column's name.
        name: What the error messages call it.
        column: The column; `None` is `"prompt"`.
        render: Makes the text of a conversation; `None` joins the messages' texts with line breaks. A string is then
            a conversation of one message.
        are_answers: Whether it is an answer, so that a conversation may end with the assistant.

    Returns:
        The text; or the prompt itself, if it is none of these.

    Raises:
        PromptError: If a conversation is empty, holds other things than text, or ends with an answer.
        PromptTypeError: If it holds something that is no message.
    """
    wanted = PROMPT_COLUMN if column is None else column
    if isinstance(prompt, Mapping) and wanted in prompt:
        prompt = prompt[wanted]
    if isinstance(prompt, str):
        return prompt if render is None else render([{"role": "user", "content": str.__str__(prompt)}])
    if not isinstance(prompt, list | tuple | np.ndarray) or not any(isinstance(part, Mapping) for part in prompt):
        return prompt
    messages = [_message(message, f"{name}[{number}]") for number, message in enumerate(prompt)]
    if messages[-1]["role"] == "assistant" and not are_answers:
        raise PromptError(
            f"{name} ends with the assistant's answer. A prompt is what comes before it: leave it out, "
            "[messages[:-1] for messages in prompts], and pass it among the answers if the generator reads them."
        )
    return (
        "\n".join(filter(None, (message["content"] for message in messages))) if render is None else render(messages)
    )


def _message(message: Any, name: str) -> dict[str, Any]:
    """A message with its content as text."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptTypeError(
            f"{name} is no chat message: expected {{'role': 'user', 'content': '...'}}, found {message!r:.60}."
        )
    return {**message, "content": _content(message["content"], name)}


def _content(content: Any, name: str) -> str:
    if content is None:  # of a message that only calls tools
        return ""
    if isinstance(content, str):
        return str.__str__(content)
    parts = list(content) if isinstance(content, list | tuple | np.ndarray) else [content]
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PromptError(
                f"{name} holds other things than text (a part of type {kind!r}), which no text encoder reads. Leave "
                "such parts out, or say in words what is in them."
            )
        texts.append(text)
    return "\n".join(texts)
