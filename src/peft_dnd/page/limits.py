# SPDX-License-Identifier: Apache-2.0
"""What a page takes from its visitors: how large a file, how many prompts, how long a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import GeneratorConfigError, PromptError


@dataclass(frozen=True)
class PageLimits:
    """How much a page takes from each visitor.

    Args:
        upload_bytes: The largest file of prompts.
        uploads: How many such files of all visitors are kept at once; further ones are refused.
        adapters: How many adapters of all visitors are kept at once; the one that was not used for longest goes.
        prompts: The most prompts of one adapter.
        prompt_characters: The longest prompt.
        question_characters: The longest question to the models.
        answer_tokens: After how many tokens an answer is cut.
        turns: How many questions and answers of a visitor are kept, and read again by a base with a chat template.
        waiting: How many requests may wait for their turn; further ones are refused.
        idle_seconds: How long what a visitor has made is kept.

    Raises:
        GeneratorConfigError: If one of them is not a whole number of at least 1.
    """

    upload_bytes: int = 2**20
    uploads: int = 256
    adapters: int = 64
    prompts: int = 1000
    prompt_characters: int = 8000
    question_characters: int = 2000
    answer_tokens: int = 64
    turns: int = 8
    waiting: int = 32
    idle_seconds: int = 3600

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GeneratorConfigError(f"A page's {field.name} must be a whole number from 1, got {value!r}.")

    def check_file(self, path: Path) -> None:
        """Check an uploaded file before it is read.

        Raises:
            PromptError: If it is too large.
        """
        size = path.stat().st_size
        if size > self.upload_bytes:
            raise PromptError(
                f"The file has {size:,} bytes, and this page takes {self.upload_bytes:,}. Give fewer prompts: some "
                "dozens that are typical say as much."
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check prompts before a generator reads them.

        Raises:
            PromptError: If there are none, too many, or one is too long.
        """
        if not prompts:
            raise PromptError("There are no prompts. Paste some, one a line, or drop a file of them.")
        if len(prompts) > self.prompts:
            raise PromptError(
                f"There are {len(prompts):,} prompts, and this page takes {self.prompts:,}. Give fewer: some dozens "
                "that are typical say as much."
            )
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise PromptError(f"Prompt {number} must be a text, found {prompt!r:.60}.")
            if len(prompt) > self.prompt_characters:
                raise PromptError(
                    f"Prompt {number} has {len(prompt):,} characters, and this page takes "
                    f"{self.prompt_characters:,}. Shorten it, or leave it out."
                )

    def check_question(self, question: str) -> None:
        """Check a question before a model reads it.

        Raises:
            PromptError: If it is empty or too long.
        """
        if not question.strip():
            raise PromptError("There is no question. Write one.")
        if len(question) > self.question_characters:
            raise PromptError(
                f"The question has {len(question):,} characters, and this page takes {self.question_characters:,}. "
                "Shorten it."
            )
