# SPDX-License-Identifier: Apache-2.0
"""What every family of decoders refuses: impossible shapes, positions and settings, states of other shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ..adapters.positions import TokenPositions
from ..errors import GeneratorConfigError


GridShape = tuple[int, int, int]


def check_shape(name: str, shape: Iterable[int]) -> GridShape:
    """Takes any three positive integers, a list from JSON included, and refuses everything else."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if len(sizes) != 3 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise GeneratorConfigError(f"{name} must be three positive integers (N, L, C), but is {shape!r}.")
    return sizes


def check_positions(positions: TokenPositions, num_tokens: int) -> None:
    """Refuses positions that are those of another number of weight tokens."""
    if len(positions.slots) != num_tokens:
        raise GeneratorConfigError(
            f"There are {num_tokens} weight tokens, but positions of {len(positions.slots)}. Both must come from the "
            "same weight tokenizer."
        )


def check_settings(sizes: Mapping[str, int], dropout: float, summary_noise: float) -> None:
    """Refuses sizes that are no positive integers, and impossible shares of dropout and noise."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GeneratorConfigError(f"{name} must be a positive integer, but is {value!r}.")
    if not 0 <= dropout < 1:
        raise GeneratorConfigError(f"dropout must be at least 0 and below 1, but is {dropout!r}.")
    if not 0 <= summary_noise < math.inf:
        raise GeneratorConfigError(f"summary_noise must be finite and not negative, but is {summary_noise!r}.")


def check_set(states: torch.Tensor, mask: torch.Tensor, size: int) -> None:
    """Refuses states of any N and L that are not (B, N, L, `size`), and a mask that does not go with them."""
    if states.dim() != 4 or states.shape[-1] != size or mask.shape != states.shape[:3]:
        raise GeneratorConfigError(
            f"Condition states must have the shape (batch, N, L, {size}) and the mask that without its last axis, but "
            f"they have {tuple(states.shape)} and {tuple(mask.shape)}. Encode the prompts with the text encoder that "
            "this decoder was built for."
        )
