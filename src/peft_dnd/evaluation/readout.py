# SPDX-License-Identifier: Apache-2.0
"""Reading the protocol's rows and headline figures off a table of per-example scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import EvaluationError
from .intervals import Estimate, ScoreTable, read_estimates
from .rows import CONTROLS, row_label, row_number


Scores = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Row:
    """One row of the protocol.

    Attributes:
        key: Its name, a key of `PROTOCOL_ROWS`, or `generated_by_<name>` for another generator.
        mean: Mean over the tasks of their mean scores.
        by_task: Task -> its mean score.
        margin: The generated row minus this one, paired by example; `None` where either is missing.
        margin_by_task: The same for each task.
    """

    key: str
    mean: Estimate
    by_task: Mapping[str, Estimate]
    margin: Estimate | None = None
    margin_by_task: Mapping[str, Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "number": self.number,
            "label": self.label,
            "mean": self.mean.to_dict(),
            "by_task": {task: estimate.to_dict() for task, estimate in self.by_task.items()},
            "margin": self.margin and self.margin.to_dict(),
            "margin_by_task": {task: estimate.to_dict() for task, estimate in self.margin_by_task.items()},
        }

    @classmethod
    def from_dict(cls, key: str, data: Mapping[str, Any]) -> Row:
        """Read what `to_dict` wrote."""
        return cls(
            key,
            Estimate.from_dict(data["mean"]),
            read_estimates(data["by_task"]),
            data["margin"] and Estimate.from_dict(data["margin"]),
            read_estimates(data["margin_by_task"]),
        )

    @property
    def label(self) -> str:
        """What a reader is told that it is."""
        return row_label(self.key)

    @property
    def number(self) -> int:
        """Its number in the protocol, 1 to 10."""
        return row_number(self.key)


class RowReader:
    """Reads rows, the share of the gap and the conditioning gain off a table of scores.

    Args:
        keys: The rows' keys, in the order in which they stand in the table.
        table: Their scores.
    """

    def __init__(self, keys: Sequence[str], table: ScoreTable) -> None:
        self.place = {key: i for i, key in enumerate(keys)}
        self.table = table

    def row(self, key: str) -> Row:
        """A row with its intervals, and its margin to the generated row."""
        place, own = self.place[key], self.place.get("generated")
        mean, by_task = self.table.estimate(lambda means: means[place])
        if own is None or own == place:
            return Row(key, mean, by_task)
        return Row(key, mean, by_task, *self.table.estimate(lambda means: means[own] - means[place]))

    def share_of_gap_closed(self) -> tuple[Estimate | None, dict[str, Estimate]]:
        """(generated - base) / (trained - base), for the means over the tasks and for each task."""
        if not {"base", "generated", "trained"} <= set(self.place):
            return None, {}
        base, own, ceiling = (self.place[key] for key in ("base", "generated", "trained"))

        def share(means: np.ndarray) -> np.ndarray:
            gap = means[ceiling] - means[base]
            return np.where(gap > 0, (means[own] - means[base]) / np.where(gap > 0, gap, 1.0), np.nan)

        mean, by_task = self.table.estimate(share)
        defined = {task: estimate for task, estimate in by_task.items() if np.isfinite(estimate.value)}
        return (mean if np.isfinite(mean.value) else None), defined

    def conditioning_gain(self) -> tuple[Estimate | None, dict[str, Estimate]]:
        """Generated minus the best control, for the means over the tasks and for each task."""
        controls = [self.place[key] for key in CONTROLS if key in self.place]
        if not controls or "generated" not in self.place:
            return None, {}
        own = self.place["generated"]
        return self.table.estimate(lambda means: means[own] - means[controls].max(0))


def score_tables(scores: Scores, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Put scores together to a table (row, example) for each task, and check that they belong together.

    Raises:
        EvaluationError: If they do not.
    """
    if not keys or not scores[keys[0]]:
        raise EvaluationError("There are no scores to report: give at least one row with at least one task.")
    first = scores[keys[0]]
    for key in keys:
        if set(scores[key]) != set(first):
            raise EvaluationError(
                f"Row {key!r} has the tasks {sorted(scores[key])}, row {keys[0]!r} has {sorted(first)}. Score every "
                "row on the same tasks."
            )
        for task, expected in first.items():
            if len(scores[key][task]) != len(expected) or not len(expected):
                raise EvaluationError(
                    f"Row {key!r} has {len(scores[key][task])} scores for task {task!r}, row {keys[0]!r} has "
                    f"{len(expected)}. The scorer must give one score for each example, the same examples for every "
                    "adapter."
                )
    tables = {task: np.array([scores[key][task] for key in keys], dtype=np.float64) for task in first}
    for task, table in tables.items():
        if not np.isfinite(table).all():
            raise EvaluationError(f"The scores of task {task!r} are not all finite. Mend the scorer.")
    return tables
