# SPDX-License-Identifier: Apache-2.0
"""Prompts that say nothing of a task: what a generator that reads its prompts must do badly with."""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import EvaluationError


_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
_SIGNS = string.ascii_letters + string.digits + string.punctuation
# What a constant prompt set is where there are no training tasks to take one from.
PLAIN_PROMPTS = ("Please help me with this.", "What is the answer?", "Do what is asked.", "Here is a task for you.")


def junk_prompts(count: int, *, seed: int | str = 0, kind: str = "mixed") -> list[str]:
    """Make prompts that mean nothing.

    Args:
        count: How many.
        seed: The same seed gives the same prompts, on every platform.
        kind: `"words"`: sentences of words that do not exist; `"characters"`: random letters, digits and signs;
            `"mixed"`: the two in turn.

    Raises:
        EvaluationError: If the kind is another one, or `count` is less than 1.

    Example:
        >>> junk_prompts(2, seed=0)[0] == junk_prompts(1, seed=0)[0]
        True
    """
    kinds = {"words": [_sentence], "characters": [_characters], "mixed": [_sentence, _characters]}
    if kind not in kinds or count < 1:
        raise EvaluationError(f"Junk is one of {', '.join(kinds)}, at least 1 of it; got {kind!r}, {count}.")
    chance = random.Random(f"junk {seed}")
    return [kinds[kind][i % len(kinds[kind])](chance) for i in range(count)]


def shuffled_tasks(tasks: Sequence[str], *, seed: int = 0, kinds: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give each task another one, each once: a random cycle through all of them (Sattolo's algorithm).

    Args:
        tasks: At least two tasks.
        seed: Which cycle.
        kinds: Task -> what it wants, for tasks that share that with others; each then gets a task of another kind.

    Raises:
        EvaluationError: If there are fewer than two, or more than half of them are of one kind.

    Example:
        >>> shuffled_tasks(["law", "tax"])
        {'law': 'tax', 'tax': 'law'}
    """
    if len(tasks) < 2:
        raise EvaluationError(f"Prompts can only be exchanged among two tasks or more, got {len(tasks)}.")
    chance = random.Random(f"shuffle {seed}")
    order = list(tasks)
    for i in range(len(order) - 1, 0, -1):
        j = int(chance.random() * i)
        order[i], order[j] = order[j], order[i]
    if not kinds:
        return dict(zip(tasks, order, strict=True))
    # Kind by kind in a row, a step as long as the largest kind leads from each task to one of another kind.
    kind_of = {task: kinds.get(task, task) for task in order}
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kind_of.values()))}
    order.sort(key=lambda task: places[kind_of[task]])
    kind, step = Counter(kind_of.values()).most_common(1)[0]
    if 2 * step > len(order):
        raise EvaluationError(
            f"{step} of {len(order)} held-out tasks are of the kind {kind!r}, so not each can get the prompts of "
            "another kind. At most half may be of one kind."
        )
    return {task: order[(place + step) % len(order)] for place, task in enumerate(order)}


def constant_prompts(training: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[str]:
    """One prompt set for every task: a prompt of each training task, or, where there are none, plain phrases.

    Args:
        training: Training task -> its prompts.
        seed: Which prompt of each.
    """
    chance = random.Random(f"constant {seed}")
    return [lines[int(chance.random() * len(lines))] for lines in training.values()] or list(PLAIN_PROMPTS)


def _sentence(chance: random.Random) -> str:
    words = []
    for _ in range(4 + int(chance.random() * 9)):
        syllables = 1 + int(chance.random() * 3)
        words.append("".join(_one(_CONSONANTS, chance) + _one(_VOWELS, chance) for _ in range(syllables)))
    return " ".join(words) + " ?"


def _characters(chance: random.Random) -> str:
    words = ["".join(_one(_SIGNS, chance) for _ in range(2 + int(chance.random() * 8))) for _ in range(8)]
    return " ".join(words)


def _one(letters: str, chance: random.Random) -> str:
    return letters[int(chance.random() * len(letters))]
