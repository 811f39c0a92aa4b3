# SPDX-License-Identifier: Apache-2.0
"""Whether two ways to compute the same logits agree, as far as the model's precision can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch


_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCE = 5e-2
"""Norms of differences within these shares of the logits' spread pass without asking how the model rounds."""

_TIMES_ROUNDING = 4.0
_MOST_ROUNDING = 0.25
"""Beyond, two ways agree up to so many times what rounding alone changes, and never beyond the second share: another
item's adapter changes about half of the spread. On Gemma 3 270M in bfloat16 the two ways differ by 0.6 to 2.2 times
what rounding changes (twelve pairs of rows, two draws each), by 0.01 to 0.06 of the spread."""


def disagreement(
    found: torch.Tensor,
    expected: torch.Tensor,
    dtypes: Iterable[torch.dtype],
    expected_of_varied: Callable[[float], torch.Tensor],
) -> str | None:
    """What is wrong with logits that should be the expected ones, if anything.

    Deep models in half precision round so much that two right ways may lie far apart. What as small a change of the
    adapters does to one of them tells how far.

    Args:
        found: Logits, any shape.
        expected: The same, computed another way.
        dtypes: Those of the model's weights.
        expected_of_varied: The expected way's logits after its adapters' values were multiplied by one plus noise
            of this standard deviation; called only where it matters.
    """
    epsilon = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
    low = epsilon > torch.finfo(torch.float32).eps
    distance = _share_of_spread(found, expected)
    tolerance = _LOW_PRECISION_TOLERANCE if low else _TOLERANCE
    if low and distance >= tolerance:
        # To the nearest value errs by up to half an epsilon, evenly: its standard deviation is about a quarter.
        rounding = _share_of_spread(expected_of_varied(epsilon / 4), expected)
        tolerance = min(_TIMES_ROUNDING * rounding, _MOST_ROUNDING)
    # In this order: what is no number agrees with nothing.
    return None if distance < tolerance else f"the logits differ by {distance:.2g} of their spread"


def varied(values: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
    """Values multiplied by one plus normal noise of this standard deviation, the same at each call."""
    chance = torch.Generator().manual_seed(1)
    return [value * (1 + deviation * torch.randn(value.shape, generator=chance)) for value in values]


def _share_of_spread(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())
