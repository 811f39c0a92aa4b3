# SPDX-License-Identifier: Apache-2.0
"""Where a bound is to lie, given what was seen of the training tasks: derived from a share of false alarms."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor

from ..errors import PolicyError
from ..storage.digests import texts_digest


# Of fewer tasks nothing is known of how tasks differ.
FEWEST_TASKS = 3
FALSE_ALARMS = 0.01
# More adapters than that tell hardly more.
_MOST_TASKS = 128


def upper_bound(values: Tensor, false_alarms: float) -> Tensor:
    """The bound that one more value of the kind exceeds with a given probability.

    For T values taken for normally distributed it is the upper end of their one-sided prediction interval,
    mean + t(T - 1, 1 - p) s sqrt(1 + 1 / T), with s their standard deviation and t the quantile of Student's
    distribution; and never less than the largest value seen. Few values therefore give a wide bound.

    Args:
        values: (T, ...), T at least 3, any floating dtype.
        false_alarms: The probability p, between 0 and 1.

    Returns:
        (...), float64.

    Raises:
        PolicyError: If there are fewer than three values, or p is no probability.
    """
    from scipy.special import stdtrit

    if len(values) < FEWEST_TASKS:
        raise PolicyError(
            f"A bound is calibrated on {FEWEST_TASKS} training tasks or more, got {len(values)}. State the bound "
            "yourself, or give more tasks."
        )
    check_false_alarms(false_alarms)
    seen, count = values.double(), len(values)
    quantile = float(stdtrit(count - 1, 1 - false_alarms))
    return torch.maximum(seen.mean(0) + quantile * sqrt(1 + 1 / count) * seen.std(0), seen.amax(0))


def check_false_alarms(false_alarms: float) -> None:
    """Refuse what is no probability.

    Raises:
        PolicyError: If it is none.
    """
    if not isinstance(false_alarms, float) or not 0 < false_alarms < 1:
        raise PolicyError(f"false_alarms must be a number between 0 and 1, got {false_alarms!r:.80}.")


def tasks_drawn(tasks: Iterable[str]) -> list[str]:
    """The tasks whose adapters a bound is calibrated on, where each has to be written or run: of many 128, by name."""
    return sorted(tasks, key=lambda name: texts_digest([name]))[:_MOST_TASKS]
