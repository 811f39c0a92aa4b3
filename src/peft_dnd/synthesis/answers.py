# SPDX-License-Identifier: Apache-2.0
"""Answers to synthetic prompts, by whoever can do the task: with the task's text and solved seeds in its window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import GeneratorConfigError
from .wording import TaskSeeds, asked_prompt, context_for_answers
from .writers import TextWriter, Written


@dataclass(frozen=True)
class AnswerAsked:
    """How answers are asked for.

    Attributes:
        max_new_tokens: The most tokens of an answer; one that was not finished by then is left out.
        stop: A text at which an answer ends, such as a line end for a base that was not tuned to stop by itself.
        votes: With 1 the likeliest answer is taken. With more so many are drawn, and a prompt is kept only if more
            than half of them are the same, which is its answer (self-consistency, arXiv 2203.11171).
        temperature: Of those draws.

    Raises:
        GeneratorConfigError: If a value is impossible.
    """

    max_new_tokens: int = 64
    stop: str | None = None
    votes: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.votes < 1 or self.temperature <= 0:
            raise GeneratorConfigError(
                f"max_new_tokens and votes must be at least 1 and the temperature above 0, got {asdict(self)}."
            )


def answers_to(
    prompts: Sequence[str], seeds: TaskSeeds, writer: TextWriter, asked: AnswerAsked, seed: int
) -> list[tuple[str | None, str | None]]:
    """Have prompts answered.

    Returns:
        For each prompt its answer and `None`, or `None` and why it has none.
    """
    window = context_for_answers(seeds, chats=writer.chats)
    between = "\n\n" if writer.chats else ""
    texts = [f"{window}{between}{asked_prompt(prompt, chats=writer.chats)}" for prompt in prompts]
    how: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "stop": asked.stop}
    if asked.votes == 1:
        return [_checked(given) for given in writer.write(texts, **how, seed=seed)]
    texts = [text for text in texts for _ in range(asked.votes)]
    given = writer.write(texts, **how, temperature=asked.temperature, seed=seed)
    return [_elected(given[start : start + asked.votes]) for start in range(0, len(given), asked.votes)]


def _checked(given: Written) -> tuple[str | None, str | None]:
    answer = given.text.strip()
    if not answer:
        return None, "not answered"
    return (answer, None) if given.finished else (None, "answer too long")


def _elected(votes: Sequence[Written]) -> tuple[str | None, str | None]:
    answers = [answer for answer, _ in map(_checked, votes) if answer is not None]
    if not answers:
        return _checked(votes[0])
    answer, count = Counter(answers).most_common(1)[0]
    return (answer, None) if 2 * count > len(votes) else (None, "answers differ")
