# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, which its presentation and the report itself both stand on: rows, headlines, costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvaluationError
from .readout import Row, Scores
from .statistics import Estimate


@dataclass(frozen=True)
class ReportFigures:
    """What was measured of a generator's adapters on held-out tasks, and of what they must be compared with.

    Attributes:
        tasks: The held-out tasks.
        rows: Key -> row, in the protocol's order; what was not measured is not there.
        not_measured: Key of a row that is missing -> why.
        share_of_gap_closed: (generated - base) / (trained - base), of the means over tasks; `None` without those
            rows, or where the trained adapters are no better than the base.
        share_of_gap_closed_by_task: The same for each task where it is defined.
        conditioning_gain: Generated minus the best of the control rows (other tasks' prompts, junk, constant). The
            best is the one with the best mean; it is chosen anew in each resample.
        conditioning_gain_by_task: The same for each task, minus the best control of that task.
        costs: Seconds and bytes to generate; apart, under `"fitting"`, what collecting and fitting cost.
        details: How rows came about: each training adapter's scores, the nearest tasks, ridge's settings and so on.
        settings: What the report was made with: seed, confidence, resamples, versions.
        scores: Row -> task -> a score for each example; `None` in a report read back without them.
    """

    tasks: tuple[str, ...]
    rows: Mapping[str, Row]
    not_measured: Mapping[str, str]
    share_of_gap_closed: Estimate | None
    share_of_gap_closed_by_task: Mapping[str, Estimate]
    conditioning_gain: Estimate | None
    conditioning_gain_by_task: Mapping[str, Estimate]
    costs: Mapping[str, Any]
    details: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Scores | None = field(default=None, repr=False)

    def row(self, key: str) -> Row:
        """A row by its key.

        Raises:
            EvaluationError: If it was not measured; it says why.
        """
        if key not in self.rows:
            why = self.not_measured.get(key, f"there is no such row; those measured are {', '.join(self.rows)}")
            raise EvaluationError(f"Row {key!r} was not measured: {why}.")
        return self.rows[key]

    def clearly_above(self, key: str, *, over_tasks: bool = False) -> bool | None:
        """Whether the generated row's interval lies wholly above another row's: the two do not touch.

        The interval of the paired difference, `row(key).margin`, tells smaller differences apart.

        Args:
            key: The other row.
            over_tasks: Which intervals, see [`Estimate`].

        Returns:
            `None` where there are no intervals.
        """
        ours, theirs = (
            row.mean.over_tasks if over_tasks else row.mean.over_examples
            for row in (self.row("generated"), self.row(key))
        )
        return None if ours is None or theirs is None else ours[0] > theirs[1]
