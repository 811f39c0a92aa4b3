# SPDX-License-Identifier: Apache-2.0
"""The directions in which the prompts of different tasks lie apart, beside how those of one task scatter.

Fisher's linear discriminants (1936), of many tasks with few prompts each: principal components first, the scatter
within tasks shrunk towards a sphere (Ledoit and Wolf's idea, with a fixed share), then the largest differences between
tasks in units of that scatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


_SHRINKAGE = 0.3
_MOST_COMPONENTS = 1024
_SCATTER_FLOOR = 1e-6


def discriminants(states_of_tasks: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The first discriminants of tasks, the strongest first.

    Each is scaled so that what it gives of a few prompts' mean has a variance of about 1 over all tasks: by
    1 / sqrt(s^2 + 1/4), with s^2 the variance between tasks in units of that within them, which four prompts quarter.

    Args:
        states_of_tasks: for each task the states of its prompts, (any number, C), standardised feature by feature.
        count: how many.

    Returns:
        (count, C), float32; zero from the number of tasks on, for as many tell no more apart.
    """
    states = torch.cat([states.float() for states in states_of_tasks])
    task = torch.repeat_interleave(
        torch.arange(len(states_of_tasks)), torch.tensor([len(states) for states in states_of_tasks])
    ).to(states.device)
    found = states.new_zeros(count, states.shape[1])
    if len(states_of_tasks) < 2:
        return found
    components = _principal_components(states)
    reduced = states @ components.T
    means = reduced.new_zeros(len(states_of_tasks), reduced.shape[1]).index_add_(0, task, reduced)
    means /= torch.bincount(task)[:, None]
    whitening = _whitening(reduced - means[task], len(states) - len(states_of_tasks))
    between = (means - means.mean(0)) @ whitening
    _, sizes, directions = torch.linalg.svd(between, full_matrices=False)
    spread = sizes / len(means) ** 0.5
    directions = (directions * (spread.square() + 0.25).rsqrt()[:, None]) @ whitening.T @ components
    found[: len(directions)] = directions[:count]
    return found


def _principal_components(states: torch.Tensor) -> torch.Tensor:
    """(k, C): the directions of the largest variance, at most `_MOST_COMPONENTS` and as many as there are states."""
    count, width = states.shape
    most = min(_MOST_COMPONENTS, count, width)
    if count < width:  # the smaller of the two products has the same information
        values, vectors = torch.linalg.eigh(states @ states.T)
        kept = vectors[:, -most:].T.flip(0) @ states
        return kept / values[-most:].flip(0).clamp_min(_SCATTER_FLOOR).sqrt()[:, None]
    return torch.linalg.eigh(states.T @ states).eigenvectors[:, -most:].T.flip(0)


def _whitening(scatter: torch.Tensor, freedom: int) -> torch.Tensor:
    """(k, k): what brings the scatter within tasks, shrunk towards a sphere, to unit variance."""
    covariance = scatter.T @ scatter / max(1, freedom)
    size = covariance.diagonal().mean().clamp_min(_SCATTER_FLOOR)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    values, vectors = torch.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * size * identity)
    return vectors * values.rsqrt()
