# SPDX-License-Identifier: Apache-2.0
"""The words in which a writer is asked for prompts and for answers, and reading prompts out of what it wrote.

A writer that follows instructions is asked for a list. Another one is given a list that it continues, as in
Self-Instruct (arXiv 2212.10560); what it was in the middle of when it had to stop is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PromptError, PromptTypeError
from ..text.prompts import check_prompts
from ..text.prompts_and_answers import check_answers
from .writers import Written


_ITEM = re.compile(r"\s*(?:[-*•]\s+)?(\d+)\s*[.):]\s*(\S.*)")
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"))
_BETWEEN = "\n---\n"


@dataclass(frozen=True)
class TaskSeeds:
    """What is known of a task to begin with: a few prompts, a description, or both.

    Attributes:
        prompts: Some prompts of the task.
        description: What the task is, in a sentence or more.
        answers: The right answers to the prompts, one each: solved examples, for whoever answers.

    Raises:
        PromptError: If there is neither a prompt nor a description, one is empty, or there is not one answer for each.
        PromptTypeError: If the prompts are no sequence of strings.
    """

    prompts: tuple[str, ...] = ()
    description: str | None = None
    answers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompts and not (self.description or "").strip():
            raise PromptError("A task needs some seed prompts or a description, or nobody knows what it is.")
        if not self.prompts:
            return
        prompts = check_prompts(self.prompts, "the seeds")
        answers = None if self.answers is None else check_answers(prompts, self.answers, "the seeds")
        first = sorted({prompt: place for place, prompt in reversed(list(enumerate(prompts)))}.values())
        object.__setattr__(self, "prompts", tuple(prompts[place] for place in first))
        object.__setattr__(self, "answers", answers and tuple(answers[place] for place in first))


def check_seeds(seeds: object) -> None:
    """Make sure that what is known of a task is `TaskSeeds`, and not its prompts alone.

    Raises:
        PromptTypeError: If it is something else.
    """
    if not isinstance(seeds, TaskSeeds):
        raise PromptTypeError(
            f"What is known of the task must be TaskSeeds, got a {type(seeds).__name__}. Put it into one: "
            "TaskSeeds(prompts, description=...)."
        )


def request_for_prompts(seeds: TaskSeeds, shown: Sequence[str], wanted: int, *, chats: bool) -> str:
    """What to tell a writer so that it writes more prompts of a task.

    Args:
        seeds: The task.
        shown: The prompts to show it, none if there are none.
        wanted: How many to ask for, where it can be asked.
        chats: Whether the writer follows an instruction.
    """
    told = "" if seeds.description is None else f"{seeds.description.strip()}\n\n"
    if chats:
        task = f"The task: {told}" if told else ""
        examples = f"Requests that people made for it:\n\n{_listed(shown)}\n\n" if shown else ""
        between = "with a line of --- between them" if _are_long(shown) else "as a numbered list, one a line"
        return (
            f"{task}{examples}Write {wanted} more requests of just this kind, {between}. They should differ from "
            "one another in what they ask about and in how they are put. Do not answer them, and write nothing else."
        )
    if _are_long(shown):
        return f"{told}{_listed(shown)}{_BETWEEN}"
    return f"{told}{_listed(shown)}{chr(10) if shown else ''}{len(shown) + 1}."


def end_of_list(shown: Sequence[str], *, chats: bool) -> str | None:
    """The text at which a writer may stop, for what follows is no list any more; `None` if there is none."""
    return None if chats or _are_long(shown) else "\n\n"


def prompts_in(written: Written, shown: Sequence[str], *, chats: bool) -> list[str]:
    """The prompts in what a writer wrote after [`request_for_prompts`]."""
    if _are_long(shown):
        parts = re.split(r"\n-{3,}[ \t]*(?:\n|$)", written.text)
        found = [part.strip() for part in (parts if written.finished else parts[:-1])]
        return [part for part in found if part and not set(part) <= {"-"}]
    text = written.text if chats else f"{len(shown) + 1}.{written.text}"
    lines = text.split("\n")
    if not written.finished:
        lines = lines[:-1]
    found, expected = [], None
    for line in lines:
        item = _ITEM.fullmatch(line)
        if item is None or (expected is not None and int(item[1]) != expected):
            if found and line.strip() and not chats:
                break  # it went on with something else
            continue
        expected = int(item[1]) + 1
        found.append(_without_quotes(item[2].strip()))
    return [prompt for prompt in found if prompt]


def context_for_answers(seeds: TaskSeeds, *, chats: bool) -> str:
    """What stands in the window of whoever answers, before the prompt: the description and the solved seeds.

    Without a chat template the prompt and a line end are to follow; with one this is the system's message.
    """
    told = "" if seeds.description is None else f"{seeds.description.strip()}\n\n"
    if not chats:
        solved = zip(seeds.prompts, seeds.answers or (), strict=False)
        return told + "".join(f"{prompt}\n{answer}\n\n" for prompt, answer in solved)
    if seeds.answers is None:
        return told.strip()
    solved = zip(seeds.prompts, seeds.answers, strict=True)
    examples = "\n\n".join(f"Request: {prompt}\nAnswer: {answer}" for prompt, answer in solved)
    return f"{told}Answer as in these examples, with the answer alone:\n\n{examples}"


def asked_prompt(prompt: str, *, chats: bool) -> str:
    """A prompt as the base reads it: a line of its own where there is no chat template."""
    return prompt if chats else f"{prompt}\n"


def _are_long(shown: Sequence[str]) -> bool:
    return any("\n" in prompt for prompt in shown)


def _listed(shown: Sequence[str]) -> str:
    if _are_long(shown):
        return _BETWEEN.join(shown)
    return "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(shown, 1))


def _without_quotes(text: str) -> str:
    for opening, closing in _QUOTES:
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
            return text[1:-1].strip()
    return text
