# SPDX-License-Identifier: Apache-2.0
"""Teachers of context distillation: what they have in their window, and their answers in a smaller head's numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from language_model.rows import IGNORED, in_context
from language_model.tasks import Example, Task
from peft_dnd.fitting import distil_task
from peft_dnd.pairs.distillation import ROWS_NAME, DistillationWriter, read_record


def ask_teacher(
    folder: Path,
    teacher: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    inputs: int,
    shots: int,
    seed: int,
    asked: Sequence[Sequence[Example]] | None = None,
) -> float:
    """Have training inputs answered, each after an instruction in a seen wording and solved examples of its task.

    Args:
        folder: Where the answers go, a folder a task, numbered in the tasks' order.
        teacher: The base, with an adapter of its own or without.
        tokenizer: Its tokenizer.
        tasks: The training tasks.
        inputs: How many of a task's training inputs, the first ones.
        shots: How many solved examples, drawn anew for each of them.
        seed: Of the draws.
        asked: For each task other inputs than its training ones.

    Returns:
        In what share of the inputs the teacher is right, word for word.
    """
    answered = right = 0
    for number, task in enumerate(tqdm(tasks, desc="Teacher", unit="task")):
        chance = random.Random(f"teacher {seed} {task.name}")
        examples = task.train[:inputs] if asked is None else asked[number]
        distil_task(
            folder / f"{number:04d}",
            [f"{example.input}\n" for example in examples],
            teacher=teacher,
            tokenizer=tokenizer,
            context=[_context(task, example, shots, chance) for example in examples],
            apply_chat_template=False,
            max_new_tokens=24,
            stop="\n",
            rows_at_once=len(examples),
            task=task.name,
        )
        for example, row in zip(examples, _rows(folder / f"{number:04d}"), strict=True):
            answered, right = answered + 1, right + (_said(row, tokenizer) == f"{example.output}\n")
    return right / answered


def said_in(answers: Path, tokenizer: Any) -> list[list[str]]:
    """For each task, in their order, what a teacher answered, without line ends."""
    return [[_said(row, tokenizer).rstrip("\n") for row in _rows(folder)] for folder in _folders(answers)]


def _said(row: Mapping[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def _context(task: Task, example: Any, shots: int, chance: random.Random) -> str:
    others = [one for one in task.train if one.input != example.input]
    drawn = chance.sample(others, min(shots, len(others)))
    # It ends where the input begins, which the student sees too.
    return in_context(chance.choice(task.instructions("seen")), [(one.input, one.output) for one in drawn], "")


def tokens_of(answers: Path) -> set[int]:
    """All tokens that teachers' answers name."""
    found: set[int] = set()
    for folder in _folders(answers):
        for row in _rows(folder):
            found.update(label for label in row["labels"] if label != IGNORED)
            found.update(token for top in row["top_tokens"] for token in top)
    return found


def copy_answers(answers: Path, pairs: Path, names: Mapping[int, int], base: str) -> None:
    """Put a teacher's answers beside the tasks of a pairs folder, for a base with a smaller head.

    Args:
        answers: Where `ask_teacher` left them.
        pairs: The pairs folder; its tasks have the same numbers.
        names: Token -> its number in the smaller head.
        base: The digest of the base with that head.
    """
    for folder in _folders(answers):
        record = read_record(folder)
        assert record is not None
        record = replace(record, teacher={**record.teacher, "base": base}, complete=False)
        writer = DistillationWriter(pairs / folder.name, record, overwrite=True)
        writer.begin()
        writer.add(_in_numbers(_rows(folder), names))
        writer.close()


def renumbered(labels: Sequence[int], names: Mapping[int, int]) -> list[int]:
    """Labels in a smaller head's numbers."""
    return [label if label == IGNORED else names[label] for label in labels]


def _in_numbers(rows: Iterator[dict[str, Any]], names: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    for row in rows:
        top = [[names[token] for token in tokens] for tokens in row["top_tokens"]]
        yield {**row, "labels": renumbered(row["labels"], names), "top_tokens": top}


def _folders(answers: Path) -> list[Path]:
    return sorted(path.parent for path in answers.glob(f"*/{ROWS_NAME}"))


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / ROWS_NAME).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
