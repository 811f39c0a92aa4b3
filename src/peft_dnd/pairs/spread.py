# SPDX-License-Identifier: Apache-2.0
"""How far each weight token varies over the training adapters, within tasks and between them.

A grid has the shape (N_w, L_w, C_w): weight tokens, rows, columns. Its valid mask, of the same shape, is `True` where
an entry stands for a weight and `False` where it only fills up a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import GeneratorConfigError, LayoutError, WeightValueError


@dataclass(frozen=True, eq=False)
class TokenSpread:
    """How much each weight token varies over the training adapters; the result of a `SpreadAccumulator`.

    Spreads are relative: their mean over the valid entries is 1, or they are all zero where nothing varies.

    Attributes:
        within_task: (N_w,) float64. Standard deviation (of the population) of each entry over one task's checkpoints,
            averaged over a token's valid entries, divided by its average over all valid entries; then averaged over
            the tasks. This is the paper's loss weight (arXiv 2506.16406, and its published code).
        between_task: (N_w,) float64. The same for the standard deviation of each entry over the tasks' mean adapters.
        entries_per_token: (N_w,) long, number of valid entries.
        num_tasks: number of tasks seen.
        num_checkpoints: number of checkpoints seen.
    """

    within_task: torch.Tensor
    between_task: torch.Tensor
    entries_per_token: torch.Tensor
    num_tasks: int
    num_checkpoints: int

    def weights(self, kind: Literal["within_task", "between_task"], floor: float = 0.01) -> torch.Tensor:
        """Loss weights for `masked_mse`: the spread, held above a floor, with a mean of 1 over the valid entries.

        Which kind: within a task, checkpoints differ by the jitter of the optimiser, and prompts of that task say
        nothing of it, since each prompt batch is paired with every checkpoint. The paper's weights hence stress the
        tokens that no prompt can predict. What a generator must learn is how tasks differ, and that is the spread
        between them. The paper's kind is kept for comparison with it.

        The floor keeps a token that is constant over the training adapters in the loss, if lightly, so that nothing
        lets it drift. Where nothing varies at all (a single task, or one checkpoint for each), all weights are 1.

        Args:
            kind: `"within_task"` (the paper's) or `"between_task"`.
            floor: smallest spread, relative to the mean spread of 1; 0 gives the paper's weights as they are.

        Returns:
            (N_w,) float32, on the CPU.

        Raises:
            GeneratorConfigError: the kind is unknown, or the floor is negative or not finite.
        """
        if kind not in ("within_task", "between_task"):
            raise GeneratorConfigError(f"Unknown kind of spread {kind!r}. Known: 'within_task', 'between_task'.")
        if not (math.isfinite(floor) and floor >= 0):
            raise GeneratorConfigError(
                f"The floor of token weights must be finite and not negative, but is {floor!r}."
            )
        spread = self.within_task if kind == "within_task" else self.between_task
        if not spread.any():
            return torch.ones(spread.shape, dtype=torch.float32)
        return _relative(spread.clamp(min=floor), self.entries_per_token).float()


class SpreadAccumulator:
    """Takes the checkpoints of all training tasks one by one and yields the spread of each weight token.

    Welford's algorithm in float64, within the current task and over the means of the finished ones, so memory is that
    of four grids however many checkpoints there are. For that, a task's checkpoints must come one after another.

    Args:
        valid_mask: (N_w, L_w, C_w) bool.

    Raises:
        LayoutError: the mask is not three-dimensional.
        WeightValueError: the mask marks no entry as valid.

    Examples:
        >>> accumulator = SpreadAccumulator(torch.ones(2, 1, 1, dtype=torch.bool))
        >>> for task, entries in [("law", [1.0, 0.0]), ("law", [3.0, 0.0]), ("med", [0.0, 5.0]), ("med", [2.0, 5.0])]:
        ...     accumulator.update(task, torch.tensor(entries).view(2, 1, 1))
        >>> spread = accumulator.result()
        >>> spread.within_task.tolist()
        [2.0, 0.0]
        >>> spread.between_task.tolist()
        [0.3333333333333333, 1.6666666666666667]
    """

    def __init__(self, valid_mask: torch.Tensor) -> None:
        if valid_mask.dim() != 3:
            raise LayoutError(f"The valid mask must be (N_w, L_w, C_w), but has {tuple(valid_mask.shape)}.")
        self._valid_mask = valid_mask.cpu()
        self._token_of_entry = self._valid_mask.nonzero()[:, 0]
        if len(self._token_of_entry) == 0:
            raise WeightValueError("The valid mask marks no entry as a weight, so no token has a spread.")
        self._entries_per_token = self._valid_mask.sum(dim=(1, 2))
        self._within_sum = torch.zeros(len(valid_mask), dtype=torch.float64)
        self._task: str | None = None
        self._finished: set[str] = set()
        self._num_checkpoints = 0
        self._checkpoints = _Welford(len(self._token_of_entry))
        self._task_means = _Welford(len(self._token_of_entry))

    def update(self, task: str, grid: torch.Tensor) -> None:
        """Takes one checkpoint.

        Args:
            task: the task's name. All checkpoints of a task must follow one another.
            grid: (N_w, L_w, C_w) in the space in which the loss is taken. Invalid entries are not looked at.

        Raises:
            LayoutError: the grid does not have the valid mask's shape.
            WeightValueError: a valid entry is not finite.
            ValueError: the task was already left for another one.
        """
        if grid.shape != self._valid_mask.shape:
            raise LayoutError(
                f"A checkpoint of the task {task!r} has a token grid of {tuple(grid.shape)}, but the valid mask has "
                f"{tuple(self._valid_mask.shape)}. All checkpoints must have the same adapter layout."
            )
        if task in self._finished:
            raise ValueError(
                f"Checkpoints of the task {task!r} must come one after another, but other tasks came between. Go "
                "through the checkpoints sorted by task."
            )
        entries = grid.detach().cpu()[self._valid_mask].double()
        if not entries.isfinite().all():
            raise WeightValueError(
                f"A checkpoint of the task {task!r} holds NaN or infinite weights. Remove it, or collect it again."
            )
        if task != self._task:
            self._finish_task()
            self._task = task
        self._checkpoints.add(entries)
        self._num_checkpoints += 1

    def result(self) -> TokenSpread:
        """The spread over everything taken so far. It closes the current task; other tasks may still follow.

        Raises:
            WeightValueError: no checkpoint was taken.
        """
        self._finish_task()
        if not self._finished:
            raise WeightValueError("No checkpoint was given, so no token has a spread.")
        return TokenSpread(
            within_task=self._within_sum / len(self._finished),
            between_task=self._relative_token_spread(self._task_means),
            entries_per_token=self._entries_per_token.clone(),
            num_tasks=len(self._finished),
            num_checkpoints=self._num_checkpoints,
        )

    def _finish_task(self) -> None:
        if self._task is None:
            return
        # Relative within each task before tasks are averaged, as the paper's code does: so each task counts alike,
        # however far its training went.
        self._within_sum += self._relative_token_spread(self._checkpoints)
        self._task_means.add(self._checkpoints.mean)
        self._finished.add(self._task)
        self._task = None
        self._checkpoints = _Welford(len(self._token_of_entry))

    def _relative_token_spread(self, moments: _Welford) -> torch.Tensor:
        sums = torch.zeros(len(self._entries_per_token), dtype=torch.float64)
        sums.index_add_(0, self._token_of_entry, moments.standard_deviation())
        return _relative(sums / self._entries_per_token.clamp(min=1), self._entries_per_token)


class _Welford:
    """Running mean and variance of vectors, in float64."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)

    def add(self, entries: torch.Tensor) -> None:
        self.count += 1
        delta = entries - self.mean
        self.mean += delta / self.count
        self._squares.addcmul_(delta, entries - self.mean)

    def standard_deviation(self) -> torch.Tensor:
        return (self._squares / self.count).sqrt()


def _relative(spread: torch.Tensor, entries_per_token: torch.Tensor) -> torch.Tensor:
    """Scales token values to a mean of 1 over the valid entries; zeros stay zeros."""
    mean = (spread * entries_per_token).sum() / entries_per_token.sum()
    return spread / mean if mean > 0 else torch.zeros_like(spread)
