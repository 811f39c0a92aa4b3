# SPDX-License-Identifier: Apache-2.0
"""The shapes that a cascaded decoder goes through: checked where they are given, derived where they are not."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import GeneratorConfigError
from .checks import GridShape, check_shape


_MAX_DERIVED_LAYERS = 8
_MIN_DERIVED_LAYERS = 2
_HIDDEN_PROMPTS_LIMIT = 2048
_HIDDEN_LIMIT = 256


def check_cascade(cascade: Iterable[Iterable[int]], first: GridShape, last: GridShape) -> tuple[GridShape, ...]:
    """Takes a cascade that leads from the condition's shape to the tokens', and refuses everything else."""
    if not isinstance(cascade, Iterable):
        raise GeneratorConfigError(f"cascade must be a list of shapes (N, L, C), but is {cascade!r}.")
    shapes = tuple(check_shape(f"cascade[{index}]", shape) for index, shape in enumerate(cascade))
    if len(shapes) < 2:
        raise GeneratorConfigError(
            f"cascade must list at least two shapes, the condition's {first} and the tokens' {last}, but is {shapes}."
        )
    if shapes[0] != first:
        raise GeneratorConfigError(
            f"cascade must begin with the condition's shape {first}, but begins with {shapes[0]}. Change the "
            "cascade's first shape, or the number of prompts, the length and the text encoder that give the condition."
        )
    if shapes[-1] != last:
        raise GeneratorConfigError(
            f"cascade must end with the shape of the token grid {last}, but ends with {shapes[-1]}. Change the "
            "cascade's last shape, or the chunk width that gives the token grid."
        )
    return shapes


def derive_cascade(
    condition_shape: Iterable[int], token_shape: Iterable[int], num_layers: int | None = None
) -> tuple[GridShape, ...]:
    """The shapes that a decoder goes through, when none are given.

    The rule follows the published cascades; its parameters are within a tenth of theirs or fewer:

    - N is interpolated geometrically: the same factor in every layer.
    - L and C are interpolated geometrically too, but an axis that shrinks does so early (it has gone the fraction
      1 - (1 - t)^2 of its way, in octaves, after the fraction t of the layers) and one that grows does so late (t^2),
      because every convolution costs in proportion to the axes it does not mix.
    - Hidden sizes stay at or below 2048 for N and 256 for L and C, or below the smaller of the axis' two ends where
      that is larger. So parameters grow in proportion to N_w and to the encoder's width, not with their squares.
    - The number of layers lets N about double and L and C change about fourfold in each; at least 2, at most 8.

    No axis ever turns back.

    Args:
        condition_shape: (N, L, C): prompts, positions in a prompt, features.
        token_shape: (N_w, L_w, C_w): weight tokens, their rows, their columns.
        num_layers: number of hyper-convolution layers, one less than the number of shapes. `None` applies the rule.

    Returns:
        `num_layers + 1` shapes, `condition_shape` and `token_shape` included.

    Raises:
        GeneratorConfigError: a shape is not three positive integers, or `num_layers` is not a positive integer.

    Examples:
        >>> derive_cascade((8, 24, 384), (60, 4, 64))
        ((8, 24, 384), (16, 9, 142), (31, 5, 78), (60, 4, 64))
        >>> derive_cascade((8, 24, 384), (60, 4, 64), num_layers=1)
        ((8, 24, 384), (60, 4, 64))
    """
    start = check_shape("condition_shape", condition_shape)
    end = check_shape("token_shape", token_shape)
    if num_layers is None:
        octaves = [abs(math.log2(last / first)) for first, last in zip(start, end, strict=True)]
        num_layers = round(max(octaves[0], octaves[1] / 2, octaves[2] / 2))
        num_layers = min(max(num_layers, _MIN_DERIVED_LAYERS), _MAX_DERIVED_LAYERS)
    elif isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise GeneratorConfigError(f"num_layers must be a positive integer or None, but is {num_layers!r}.")

    fractions = [index / num_layers for index in range(1, num_layers)]
    hidden = [
        (
            _interpolate(start[0], end[0], fraction, _HIDDEN_PROMPTS_LIMIT),
            _shrink_early(start[1], end[1], fraction),
            _shrink_early(start[2], end[2], fraction),
        )
        for fraction in fractions
    ]
    return (start, *hidden, end)


def _interpolate(first: int, last: int, fraction: float, limit: int) -> int:
    size = max(1, round(first * (last / first) ** fraction))
    return min(size, max(limit, min(first, last)))


def _shrink_early(first: int, last: int, fraction: float) -> int:
    eased = 1 - (1 - fraction) ** 2 if last < first else fraction**2
    return _interpolate(first, last, eased, _HIDDEN_LIMIT)
