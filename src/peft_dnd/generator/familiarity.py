# SPDX-License-Identifier: Apache-2.0
"""What a generator does about prompts unlike those of its fitted tasks, and what the adapter keeps of that."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import OutOfDistributionError
from ..text.out_of_distribution import OutOfDistributionWarning, PromptReference, shrinkage


# How many of the fitted tasks that an adapter's prompts are near to its provenance names.
_TASKS_NAMED = 5


@dataclass(frozen=True)
class Fallback:
    """What is asked for.

    Attributes:
        action: `"ignore"`, `"warn"`, `"shrink"`, `"mean"` or `"refuse"`; `None` warns where the generator can tell.
        threshold: Above which score; `None` is the one that the fitted tasks give for so many prompts.
        factor: What an earlier generation found to multiply by, to be done again whatever the score says now.
    """

    action: str | None = None
    threshold: float | None = None
    factor: float | None = None


@dataclass(frozen=True)
class Familiarity:
    """What is known of prompts, and what was done about them.

    Attributes:
        score: See [`PromptReference.score`][peft_dnd.text.PromptReference.score]; `None` if it is not known.
        threshold: Above which score they count as unlike the fitted tasks'.
        done: `"warn"`, `"shrink"` or `"mean"`; `"none"` where the prompts belong or it was to be ignored.
        factor: What the adapter's deviation from the mean adapter is multiplied by.
        nearest: The nearest fitted tasks, each with its share of the prompts.
    """

    score: float | None = None
    threshold: float | None = None
    done: str = "none"
    factor: float = 1.0
    nearest: tuple[tuple[str, float], ...] = ()

    def provenance(self) -> dict[str, Any]:
        """What an adapter keeps of it."""
        found: dict[str, Any] = {}
        if self.score is not None:
            found["out_of_distribution"] = self.score
            found["out_of_distribution_threshold"] = self.threshold
            found["out_of_distribution_action"] = self.done
            found["nearest_tasks"] = [list(task) for task in self.nearest]
        if self.factor < 1:
            found["shrunk_by"] = self.factor
        return found


def judge(
    known: PromptReference | None, points: Tensor, fallback: Fallback, what: str, stacklevel: int
) -> Familiarity:
    """Score prompts, and do what is to be done about them.

    Args:
        known: What the generator keeps of its fitted tasks' prompts.
        points: Where the prompts lie.
        fallback: What is asked for.
        what: What messages call the task.
        stacklevel: Of the warning, as `warnings.warn` counts it from here.

    Raises:
        OutOfDistributionError: If the prompts do not belong, and that is to be refused.
    """
    if known is None:
        return Familiarity(factor=1.0 if fallback.factor is None else fallback.factor)
    score = known.score(points)
    threshold = known.threshold(len(points)) if fallback.threshold is None else fallback.threshold
    nearest = tuple(known.nearest_tasks(points).items())[:_TASKS_NAMED]
    if fallback.factor is not None:
        return Familiarity(score, threshold, "none", fallback.factor, nearest)
    action = fallback.action or "warn"
    if action == "ignore" or score <= threshold:
        return Familiarity(score, threshold, nearest=nearest)
    if action == "shrink":
        return Familiarity(score, threshold, action, shrinkage(score, threshold), nearest)
    if action == "mean":
        return Familiarity(score, threshold, action, 0.0, nearest)
    message = (
        f"The prompts of {what} are unlike those of the tasks that the generator was fitted on: their "
        f"out-of-distribution score of {score:.3f} is above the threshold of {threshold:.3g}. The adapter may be of "
        "little use. Check the prompts, or fit the generator on tasks like this one."
    )
    if action == "refuse":
        raise OutOfDistributionError(message)
    warnings.warn(
        f'{message} out_of_distribution="ignore" silences this; "shrink", "mean" and "refuse" do something about it.',
        OutOfDistributionWarning,
        stacklevel=stacklevel + 1,
    )
    return Familiarity(score, threshold, "warn", nearest=nearest)
