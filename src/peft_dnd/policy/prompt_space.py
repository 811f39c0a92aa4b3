# SPDX-License-Identifier: Apache-2.0
"""A space in which what the prompts of one task differ in counts for little: names, wordings, forms of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..text.out_of_distribution import principal_axes


# Of wider states as many principal axes are kept.
_MOST_AXES = 384
# How much is added to every variance, in relation to their mean. With less, far paraphrases of a refused class are
# caught more often, and so are welcome prompts on topics that no training task has (benchmarks/bench_policy.py).
_ADDED = 1.0


@dataclass(frozen=True, eq=False)
class PromptSpace:
    """Divides each principal direction of the prompts' spread within tasks by how far they spread there.

    That is within-class covariance normalisation (Hatch, Kajarekar and Stolcke, Interspeech 2006), with the mean
    variance added to each, so that directions of which little is known are not blown up.

    Attributes:
        axes: Directions, float16 (C, K), orthonormal; K is at most 384.
        scales: What what lies along each is multiplied by, and last what is left beside them, float32 (K + 1,).
    """

    axes: Tensor
    scales: Tensor

    @classmethod
    def fit(cls, tasks: Sequence[Tensor], others: Sequence[Tensor] = ()) -> PromptSpace:
        """Learn how prompts spread within tasks.

        Args:
            tasks: Of each task where its texts lie, (n, C), of length 1.
            others: Where other texts lie that will be kept in the space too: it has to reach there.
        """
        points = torch.cat([*tasks, *others])
        spread = torch.cat([rows - rows.mean(0) for rows in tasks])
        width, count = points.shape[1], len(spread)
        total = spread.square().sum() / count
        axes = torch.eye(width) if width <= _MOST_AXES else principal_axes(points, _MOST_AXES)
        along = spread @ axes
        variances, turned = torch.linalg.eigh(along.T @ along / count)
        variances = variances.clamp(min=0)
        left = (total - variances.sum()).clamp(min=0) / max(1, width - len(variances))
        # Of fewer texts than directions most have no variance only because there are too few to show it.
        shown = max(1, min(width, count - len(tasks)))
        added = _ADDED * total.clamp(min=1e-12) / shown
        scales = (torch.cat([variances, left[None]]) + added).rsqrt()
        return cls((axes @ turned).half(), scales / scales.amax())

    @property
    def width(self) -> int:
        """C, the width of the states that it takes."""
        return len(self.axes)

    def place(self, points: Tensor) -> Tensor:
        """Where texts lie in the space, float32 (n, K), of length 1 but for what lies beside the axes.

        Args:
            points: Where they lie as the text encoder has it, (n, C), of length 1.
        """
        axes = self.axes.float()
        placed = []
        for rows in points.float().split(1024):
            along = rows @ axes
            beside = (rows.square().sum(1) - along.square().sum(1)).clamp(min=0) * self.scales[-1].square()
            along = along * self.scales[:-1]
            placed.append(along / (along.square().sum(1) + beside).clamp(min=1e-12).sqrt()[:, None])
        return torch.cat(placed)

    def is_usable(self) -> bool:
        """Whether it is of the form that [`fit`] gives it."""
        shaped = self.axes.dim() == 2 and self.scales.dim() == 1 and len(self.scales) == self.axes.shape[1] + 1
        floating = self.axes.is_floating_point() and self.scales.is_floating_point()
        if not (shaped and floating):
            return False
        return bool(torch.isfinite(self.axes.float()).all() and torch.isfinite(self.scales.float()).all())
