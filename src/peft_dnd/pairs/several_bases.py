# SPDX-License-Identifier: Apache-2.0
"""Pairs of several bases as one data set, and the collator of its items: for each base a batch of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import PairsFolderError
from .collator import PromptCheckpointCollator
from .dataset import PromptCheckpointDataset


class PairsOfBases(Dataset[dict[str, Any]]):
    """The pairs of several bases, one base's after another's.

    An item is one of a [`PromptCheckpointDataset`], and says of which base under `"base"`.

    Args:
        pairs: Base's name -> its pairs. Tasks of one name are taken to be the same task in all of them.

    Attributes:
        pairs: As given.
    """

    def __init__(self, pairs: Mapping[str, PromptCheckpointDataset]) -> None:
        if not pairs:
            raise PairsFolderError("There are no pairs: give those of at least one base, name -> data set.")
        self.pairs = dict(pairs)
        self._ends = list(itertools.accumulate(len(of_base) for of_base in self.pairs.values()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks of all bases, each once."""
        return tuple(dict.fromkeys(task for of_base in self.pairs.values() for task in of_base.tasks))

    @property
    def num_checkpoints(self) -> int:
        """How many checkpoints there are of all bases."""
        return sum(of_base.num_checkpoints for of_base in self.pairs.values())

    @property
    def hub_id(self) -> str | None:
        """They are no single data set on the Hub."""
        return None

    def prompts(self, task: str) -> tuple[str, ...]:
        """A task's pool of prompts, as the first base has it that has the task."""
        for of_base in self.pairs.values():
            if task in of_base.tasks:
                return of_base.prompts(task)
        raise PairsFolderError(f"There is no task {task!r}. The tasks: {', '.join(map(repr, self.tasks))}.")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the items' seeds depend."""
        for of_base in self.pairs.values():
            of_base.set_epoch(epoch)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        number = range(len(self))[index[1] if isinstance(index, tuple) else index]
        start = 0
        for (name, of_base), end in zip(self.pairs.items(), self._ends, strict=True):
            if number < end:
                place = number - start
                return {**of_base[(index[0], place) if isinstance(index, tuple) else place], "base": name}
            start = end
        raise IndexError(index)


class CollatorOfBases:
    """Makes of the items of several bases a batch for each: `{"by_base": {name: batch}}`, in the bases' order.

    Args:
        collators: Base's name -> the collator that makes its conditions, and the one that makes its batches, which may
            be the same.
    """

    def __init__(
        self,
        collators: Mapping[str, tuple[PromptCheckpointCollator, Callable[[Sequence[dict[str, Any]]], dict[str, Any]]]],
    ) -> None:
        self.inner = {name: inner for name, (inner, _) in collators.items()}
        self.collators = {name: collator for name, (_, collator) in collators.items()}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items; a base of which there is none is not in it."""
        of_bases = {name: [item for item in items if item["base"] == name] for name in self.collators}
        return {"by_base": {name: self.collators[name](of) for name, of in of_bases.items() if of}}

    @property
    def encode(self) -> bool:
        """Whether they give states."""
        return all(collator.encode for collator in self.inner.values())

    def warm_up(self, dataset: PairsOfBases) -> None:
        """Have the prompts of all tasks read."""
        for name, pairs in dataset.pairs.items():
            self.inner[name].warm_up(pairs)

    def states_of_tasks(self, dataset: PairsOfBases) -> Iterator[torch.Tensor]:
        """For each task of each base the states of all tokens of its prompts, (any number, C)."""
        for name, pairs in dataset.pairs.items():
            yield from self.inner[name].states_of_tasks(pairs)

    def some(self, dataset: PairsOfBases) -> dict[str, list[Any]]:
        """A few rows of a few tasks of each base, for those whose collator has examples."""
        return {
            name: collator.some(dataset.pairs[name])
            for name, collator in self.collators.items()
            if hasattr(collator, "some") and name in dataset.pairs
        }
