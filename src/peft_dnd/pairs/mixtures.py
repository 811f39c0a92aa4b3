# SPDX-License-Identifier: Apache-2.0
"""Mixtures: items of a data set made of two tasks, their prompts in one set and between their adapters a target.

A few tasks are few points through which to draw a map from prompts to adapters. Mixtures lay points between them, as
interpolating tasks does in meta-learning (MLTI, arXiv 2106.02695). A set of N prompts, k of one task and N - k of
another, is to give the update k/N ΔW + (N - k)/N ΔW'; see
[`interpolated_adapter`][peft_dnd.adapters.factors.interpolated_adapter] for what that is in factors. With task loss or
distillation it is to do well on rows of both, in the same shares.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import GeneratorConfigError
from .dataset import PromptCheckpointDataset


PARTNER = "partner"
OWN_SHARE = "own_share"


@dataclass
class MixtureCollator:
    """Has some of a batch's items mixed with another task, before another collator makes the batch.

    Which, with whom and in which shares follows from the items' seeds alone, so that a resumed run mixes the same. The
    partner is any other task with equal chance, and any of its checkpoints; its share is drawn uniformly.

    Args:
        collate: The collator.
        dataset: Where partners come from.
        share: How many of the items become mixtures, from 0 to 1.

    Raises:
        GeneratorConfigError: If there is no other task to mix with.
    """

    collate: Callable[[Sequence[dict[str, Any]]], Any]
    dataset: PromptCheckpointDataset
    share: float
    _numbers: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for number, task in enumerate(self.dataset.item_tasks):
            self._numbers.setdefault(task, []).append(number)
        if len(self._numbers) < 2:
            raise GeneratorConfigError(
                "mixture_share is above 0, but the training pairs hold one task, so there is none to mix it with. "
                "Set mixture_share=0, or add tasks."
            )

    def __call__(self, items: Sequence[dict[str, Any]]) -> Any:
        """Make a batch."""
        return self.collate([self._mixed(item) for item in items])

    def _mixed(self, item: dict[str, Any]) -> dict[str, Any]:
        drawn = random.Random(f"mixture {item['seed']}")
        if drawn.random() >= self.share or item.get("replayed"):
            return item
        tasks = [task for task in self._numbers if task != item["task"] and self._has_what(item, task)]
        if not tasks:
            return item
        number = drawn.choice(self._numbers[drawn.choice(tasks)])
        partner = {**self.dataset[number], "seed": drawn.getrandbits(62)}
        return {**item, PARTNER: partner, OWN_SHARE: drawn.random()}

    def _has_what(self, item: dict[str, Any], task: str) -> bool:
        """Whether a task has all that an item is held against."""
        found = (self.dataset.checkpoints(task), self.dataset.examples(task), self.dataset.distillation(task))
        names = ("state_dict", "examples", "distillation")
        return all(item[name] is None or there for name, there in zip(names, found, strict=True))


def own_part(item: dict[str, Any], count: int) -> int:
    """How many of so many prompts or rows are an item's own; the others are its partner's, at least one of each."""
    if PARTNER not in item or count < 2:
        return count
    return min(count - 1, max(1, round(item[OWN_SHARE] * count)))
