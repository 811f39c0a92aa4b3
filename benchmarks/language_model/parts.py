# SPDX-License-Identifier: Apache-2.0
"""Parts of the world: a few families for a quick look, or a number of training tasks for a curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from language_model.tasks import Task, share_of


# What a base of this size does well, and where a task is soon told from another.
SMALL_FAMILIES = ("selections", "word forms", "sentences")


@dataclass(frozen=True)
class Part:
    """A part of a world, which is asked for its tasks as a whole one is.

    Attributes:
        world: The world.
        keep: Whether a task stays.
        training: How many training tasks stay, drawn by the seed; `None`: all.
    """

    world: Any
    keep: Callable[[Task], bool] = lambda task: True
    training: int | None = None

    @property
    def seed(self) -> int:
        return int(self.world.seed)

    def of(self, kind: str) -> list[Task]:
        """The tasks of a kind; those asked for in new wordings are the training tasks that stay."""
        tasks = [task for task in self.world.of(kind) if self.keep(task)]
        if kind in ("training", "new_wordings") and self.training is not None:
            # A smaller part lies within a larger one.
            drawn = sorted(tasks, key=lambda task: share_of("part", self.seed, task.name))[: self.training]
            names = {task.name for task in drawn}
            return [task for task in tasks if task.name in names]
        return tasks


def small_part(world: Any) -> Part:
    """A few families, in forms without other languages."""
    return Part(world, lambda task: task.family in SMALL_FAMILIES and not task.languages)


def cut(task: Task, examples: int, wordings: int) -> Task:
    """The same task with its first training examples alone, asked for in fitting in its first wordings alone."""

    def write(_: Task, split: str, limit: int) -> list[str]:
        return task.instructions(split, min(limit, wordings) if split == "seen" else limit)

    return replace(task, given=(tuple(task.train[:examples]), tuple(task.test)), write=write)
