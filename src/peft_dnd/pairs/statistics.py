# SPDX-License-Identifier: Apache-2.0
"""Passes over a data set's checkpoints: the grids, spreads and sizes that normalisation and losses are scaled by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..adapters.factors import delta_weight_distances
from ..adapters.layout import AdapterLayout
from ..adapters.tokenizer import WeightNormalization, WeightTokenizer
from ..storage.progress import with_progress
from .dataset import PromptCheckpointDataset
from .spread import TokenSpread, spread_of_grids


_FLOOR_OF_OWN_SIZE = 1e-6
_FLOOR_OF_LARGEST = 1e-12


def task_balanced_grids(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer
) -> Iterator[tuple[torch.Tensor, float]]:
    """All checkpoints as token grids, each with its weight for `weight_statistics`.

    Each task weighs the same, however many checkpoints it has: weights add up to 1 for each.

    Args:
        dataset: The pairs.
        tokenizer: Makes the grids.

    Yields:
        A float32 grid of the tokenizer's `grid_shape`, and its weight.
    """
    for task, grid in _grids(dataset, tokenizer, "Mean and scale of the weights"):
        yield grid, 1.0 / len(dataset.checkpoints(task))


def token_spread(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer, normalization: WeightNormalization
) -> TokenSpread:
    """How far each weight token's entries lie apart, within tasks and between them, after normalisation.

    This takes a pass of its own, for it depends on the scales, which are known only after the one that
    [`task_balanced_grids`] serves.

    Args:
        dataset: The pairs.
        tokenizer: Makes the grids.
        normalization: Its statistics are set already; or not, for the spread of the weights as they are.
    """
    mean, scale = normalization.mean.cpu(), normalization.scale.cpu()[:, None, None]
    grids = _grids(dataset, tokenizer, "Spread of the weights")
    return spread_of_grids(((task, (grid - mean) / scale) for task, grid in grids), tokenizer.valid_mask())


def delta_weight_spread(
    dataset: PromptCheckpointDataset, layout: AdapterLayout, center: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """How far the updates of the training adapters lie from a central one, module by module: a scale for losses on ΔW.

    Args:
        dataset: The pairs.
        layout: Their layout.
        center: The central adapter, such as the mean one.

    Returns:
        (M,), float64, positive: the mean of s² ||B A - B' A'||² over the tasks' means over their checkpoints. A module
        that no adapter moves gets a trifle of its own size, or of the largest module's.
    """
    around, size = torch.zeros(2, len(layout.modules), dtype=torch.float64)
    zero = {key: torch.zeros_like(matrix) for key, matrix in center.items()}
    for task, number in with_progress(_numbered(dataset), "Spread of the updates"):
        adapter = dataset.state_dict(task, number)
        around += delta_weight_distances(adapter, center, layout).double() / len(dataset.checkpoints(task))
        size += delta_weight_distances(adapter, zero, layout).double() / len(dataset.checkpoints(task))
    tasks = sum(bool(dataset.checkpoints(task)) for task in dataset.tasks)
    floor = torch.maximum(_FLOOR_OF_OWN_SIZE * size, _FLOOR_OF_LARGEST * around.max()) / tasks
    spread = torch.maximum(around / tasks, floor)
    return torch.where(spread > 0, spread, 1.0)


def _numbered(dataset: PromptCheckpointDataset) -> list[tuple[str, int]]:
    return [(task, number) for task in dataset.tasks for number in range(len(dataset.checkpoints(task)))]


def _grids(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer, what: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for task, number in with_progress(_numbered(dataset), what):
        yield task, tokenizer.encode(dataset.state_dict(task, number))
