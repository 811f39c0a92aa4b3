# SPDX-License-Identifier: Apache-2.0
"""The formula of the spread: how far each weight token varies over adapters, within tasks and between them.

It is told the adapters' token grids; [`token_spread`] in `statistics` takes them from a data set.

A grid has the shape (N_w, L_w, C_w): weight tokens, rows, columns. Its valid mask, of the same shape, is `True` where
an entry stands for a weight and `False` where it only fills up a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

import torch

from ..errors import GeneratorConfigError


@dataclass(frozen=True, eq=False)
class TokenSpread:
    """How much each weight token varies over the training adapters; the result of [`token_spread`].

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
            GeneratorConfigError: the kind is unknown.
        """
        if kind not in ("within_task", "between_task"):
            raise GeneratorConfigError(f"Unknown kind of spread {kind!r}. Known: 'within_task', 'between_task'.")
        spread = self.within_task if kind == "within_task" else self.between_task
        if not spread.any():
            return torch.ones(spread.shape, dtype=torch.float32)
        return _relative(spread.clamp(min=floor), self.entries_per_token).float()


def spread_of_grids(grids: Iterable[tuple[str, torch.Tensor]], valid_mask: torch.Tensor) -> TokenSpread:
    """The spread of each weight token over the checkpoints of all training tasks.

    Welford's algorithm in float64, within each task and over the tasks' means, so memory is that of four grids however
    many checkpoints there are.

    Args:
        grids: Each checkpoint's task and its grid (N_w, L_w, C_w), in the space in which the loss is taken; those of a
            task one after another. Invalid entries are not looked at.
        valid_mask: (N_w, L_w, C_w) bool.

    Examples:
        >>> entries = [("law", [1.0, 0.0]), ("law", [3.0, 0.0]), ("med", [0.0, 5.0]), ("med", [2.0, 5.0])]
        >>> grids = [(task, torch.tensor(pair).view(2, 1, 1)) for task, pair in entries]
        >>> spread = spread_of_grids(grids, torch.ones(2, 1, 1, dtype=torch.bool))
        >>> spread.within_task.tolist()
        [2.0, 0.0]
        >>> spread.between_task.tolist()
        [0.3333333333333333, 1.6666666666666667]
    """
    token_of_entry = valid_mask.nonzero()[:, 0]
    entries_per_token = valid_mask.sum(dim=(1, 2))

    def of_tokens(moments: _Welford) -> torch.Tensor:
        sums = torch.zeros(len(valid_mask), dtype=torch.float64)
        sums.index_add_(0, token_of_entry, moments.standard_deviation())
        return _relative(sums / entries_per_token.clamp(min=1), entries_per_token)

    within_sum = torch.zeros(len(valid_mask), dtype=torch.float64)
    task_means = _Welford(len(token_of_entry))
    num_checkpoints = 0
    for _, of_task in groupby(grids, key=itemgetter(0)):
        checkpoints = _Welford(len(token_of_entry))
        for _, grid in of_task:
            checkpoints.add(grid[valid_mask].double())
        # Relative within each task before tasks are averaged, as the paper's code does: so each task counts alike,
        # however far its training went.
        within_sum += of_tokens(checkpoints)
        task_means.add(checkpoints.mean)
        num_checkpoints += checkpoints.count
    return TokenSpread(
        within_task=within_sum / task_means.count,
        between_task=of_tokens(task_means),
        entries_per_token=entries_per_token,
        num_tasks=task_means.count,
        num_checkpoints=num_checkpoints,
    )


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
