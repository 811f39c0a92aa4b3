# SPDX-License-Identifier: Apache-2.0
"""Rivals of a generator that need no generator: the nearest training adapter, and ridge regression on the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..errors import EvaluationError
from ..pairs.dataset import PromptCheckpointDataset
from ..text.encoder import TextEncoder


# Strengths of the penalty that are tried, as multiples of the mean eigenvalue of the kernel.
_PENALTIES = tuple(10.0**power for power in range(-6, 4))
# Embeddings that differ by less, relative to the largest number in them, differ by an encoder's rounding alone.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)


def nearest_tasks(
    text_encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], shelf: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """For each task, the one on the shelf whose prompts are most like its own: what a user would pick by hand.

    Args:
        text_encoder: A text encoder.
        prompts: Task -> its prompts.
        shelf: The tasks to choose from -> their prompts.

    Returns:
        Task -> the task on the shelf whose mean sentence embedding has the largest cosine with its own.
    """
    names = list(shelf)
    available = torch.stack([_direction(text_encoder, shelf[name]) for name in names])
    return {task: names[int((available @ _direction(text_encoder, own)).argmax())] for task, own in prompts.items()}


@dataclass(frozen=True)
class RidgeBaseline:
    """Ridge regression from a task's mean sentence embedding to its weights, fitted to the training tasks.

    Inputs and weights are centred; weights are scaled by one number a tensor, the root mean square of its deviations
    from the mean adapter, as a generator's own normalisation does. What it writes is the mean adapter plus a weighted
    sum of the training adapters' deviations from it; so it is fitted in the kernel's form, on a matrix of tasks by
    tasks, whatever the size of an adapter.

    The penalty is chosen by leave-one-out on the training tasks alone: each is predicted from the others, and the
    penalty with the least squared error of the scaled weights wins. Where all training tasks have the same prompts,
    which then say nothing, what it writes is the mean adapter.

    Make one with [`fit`][RidgeBaseline.fit].

    Attributes:
        layout: The adapters' layout.
        embeddings: The training tasks' mean sentence embeddings, float64 (task, width).
        adapters: A training adapter (the mean of its checkpoints) for each of them.
        penalty: The penalty that was chosen, as a multiple of the kernel's mean eigenvalue.
        errors: Penalty -> leave-one-out squared error relative to that of the mean adapter, under 1 if prompts help.
    """

    layout: AdapterLayout
    embeddings: np.ndarray
    adapters: tuple[Mapping[str, torch.Tensor], ...]
    penalty: float
    errors: Mapping[float, float]

    @classmethod
    def fit(cls, pairs: PromptCheckpointDataset, text_encoder: TextEncoder) -> RidgeBaseline:
        """Fit it to the training tasks.

        Args:
            pairs: At least three tasks.
            text_encoder: Reads the prompts.

        Raises:
            EvaluationError: If there are fewer than three tasks, so that nothing can be left out and fitted.
        """
        tasks = [task for task in pairs.tasks if pairs.checkpoints(task)]
        if len(tasks) < 3:
            raise EvaluationError(f"Ridge regression needs at least 3 training tasks with adapters, got {len(tasks)}.")
        embeddings = np.stack([mean_embedding(text_encoder, pairs.prompts(task)) for task in tasks])
        adapters = tuple(pairs.mean_state_dict(task) for task in tasks)
        products = _products_of_scaled(adapters)
        errors = {penalty: _left_out_error(embeddings, products, penalty) for penalty in _PENALTIES}
        mean_error = _left_out_error(embeddings, products, None)
        best = min(errors, key=lambda penalty: errors[penalty])
        relative = {penalty: error / mean_error if mean_error else 0.0 for penalty, error in errors.items()}
        return cls(pairs.layout, embeddings, adapters, best, relative)

    def write(self, text_encoder: TextEncoder, prompts: Sequence[str]) -> GeneratedAdapter:
        """The adapter for a task.

        Args:
            text_encoder: The one that it was fitted with.
            prompts: The task's prompts.
        """
        shares = _shares(self.embeddings, mean_embedding(text_encoder, prompts), self.penalty)
        state = {
            tensor.key: torch.stack(
                [share * adapter[tensor.key].double() for share, adapter in zip(shares, self.adapters, strict=True)]
            )
            .sum(0)
            .float()
            for tensor in self.layout.tensors
        }
        return GeneratedAdapter(self.layout, state, {"generator": "ridge regression"})


def mean_embedding(text_encoder: TextEncoder, prompts: Sequence[str]) -> np.ndarray:
    """The mean of the prompts' sentence embeddings, float64 (width,)."""
    mean: np.ndarray = text_encoder.encode_sentences(prompts).detach().double().mean(0).cpu().numpy()
    return mean


def _direction(text_encoder: TextEncoder, prompts: Sequence[str]) -> torch.Tensor:
    return torch.nn.functional.normalize(text_encoder.encode_sentences(prompts).mean(0), dim=0)


def _shares(embeddings: np.ndarray, new: np.ndarray, penalty: float) -> np.ndarray:
    """How much of each training adapter there is in the prediction for a new embedding; they add up to 1."""
    from sklearn.kernel_ridge import KernelRidge

    count, mean = len(embeddings), embeddings.mean(0)
    centred = embeddings - mean
    if np.abs(centred).max() <= _ROUNDING * np.abs(embeddings).max():
        return np.full(count, 1 / count)
    strength = penalty * float((centred**2).sum()) / count
    # Fitted to the identity: whatever the targets are, the prediction is this combination of them.
    ridge = KernelRidge(alpha=strength, kernel="linear").fit(centred, np.eye(count))
    of_deviations: np.ndarray = ridge.predict((new - mean)[None])[0]
    return of_deviations + (1 - of_deviations.sum()) / count


def _products_of_scaled(adapters: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """Inner products of the adapters' scaled deviations from their mean, (adapter, adapter)."""
    products = np.zeros((len(adapters), len(adapters)))
    for key in adapters[0]:
        stacked = torch.stack([adapter[key].flatten() for adapter in adapters]).double()
        deviations = stacked - stacked.mean(0)
        size = deviations.square().mean()
        if size > 0:
            products += (deviations @ deviations.T / size).numpy()
    return products


def _left_out_error(embeddings: np.ndarray, products: np.ndarray, penalty: float | None) -> float:
    """Summed squared error of each adapter as predicted from the others; by their mean where there is no penalty."""
    total = 0.0
    for out in range(len(embeddings)):
        others = np.arange(len(embeddings)) != out
        residual = np.zeros(len(embeddings))
        residual[out] = 1.0
        if penalty is None:
            residual[others] = -1.0 / others.sum()
        else:
            residual[others] = -_shares(embeddings[others], embeddings[out], penalty)
        total += float(residual @ products @ residual)
    return total
