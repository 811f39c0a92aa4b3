# SPDX-License-Identifier: Apache-2.0
"""The rows that a generator's store keeps of its tasks: which of them are replayed, and a score by the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ..adapters.generated_adapter import GeneratedAdapter
from ..pairs.examples import KeptExamples
from ..pairs.replay_store import ReplayStore, StoredTask
from .arguments import DnDTrainingArguments
from .objective import FittingObjective
from .teacher import base_digest


# Of four rows one is not replayed: what is fitted to is no measure of what is kept.
_JUDGE = 4


class StoredRows:
    """Rows in a store, for a fit on the base's own loss or on what a teacher said.

    Args:
        objective: The fit's loss.
        collators: Name of the rows -> what makes a batch of them; only those that the fit is taken on.
        args: The training arguments.
    """

    def __init__(
        self,
        objective: FittingObjective,
        collators: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], Any]],
        args: DnDTrainingArguments,
    ) -> None:
        self._objective, self._collators = objective, collators
        self._weights = {"examples": args.task_loss_weight, "distillation": args.distillation_weight}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which rows the fit is taken on."""
        return tuple(self._collators)

    @cached_property
    def base(self) -> str:
        """The digest of the base that they are read by."""
        assert self._objective.task_loss is not None
        return base_digest(self._objective.task_loss.model)

    def of(self, store: ReplayStore, name: str) -> StoredTask | None:
        """A task of which there is a row of each kind, for this base; `None` if it has none."""
        task = store.tasks[name]
        return task if store.base == self.base and all(self._usable(kind, task) for kind in self.kinds) else None

    def _usable(self, kind: str, task: StoredTask) -> bool:
        """Whether there are rows of a kind, with the probabilities that the fit is to be taken on."""
        rows = getattr(task, kind)
        without = (
            kind == "distillation"
            and not self._objective.answers_alone
            and any("top_tokens" not in row for row in rows)
        )
        return bool(rows) and not without

    def replayed(self, task: StoredTask) -> dict[str, KeptExamples]:
        """The rows of a task that are replayed."""
        return {kind: KeptExamples(_parts(getattr(task, kind))[1]) for kind in self.kinds}

    @torch.no_grad()
    def score(self, task: StoredTask, adapter: GeneratedAdapter) -> float:
        """exp(-loss) on the rows that are not replayed, from 0 to 1; of both losses the mean by their weights."""
        taken = self._objective.task_loss
        assert taken is not None
        matrices = {key: value[None].to(taken.base.device) for key, value in adapter.state_dict().items()}
        total = 0.0
        for kind in self.kinds:
            batch = self._collators[kind](_parts(getattr(task, kind))[0])
            total += self._weights[kind] * float(self._objective.row_losses(kind, matrices, [batch])[0])
        mean = total / sum(self._weights[kind] for kind in self.kinds)
        return math.exp(-max(mean, 0.0))


def _parts(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Those that a task is judged by, and those that are replayed: of a single row the same."""
    count = math.ceil(len(rows) / _JUDGE)
    return rows[:count], rows[count:] or rows
