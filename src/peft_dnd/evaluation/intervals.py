# SPDX-License-Identifier: Apache-2.0
"""Figures with their bootstrap intervals, computed from tables of per-example scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EvaluationError


Interval = tuple[float, float]
_RESAMPLES_AT_ONCE = 250


@dataclass(frozen=True)
class Estimate:
    """A measured number and how sure it is.

    Attributes:
        value: The number.
        over_examples: Its bootstrap interval when the examples of each task are drawn anew and the tasks stay: what
            is known of *these* tasks. `None` if a task has fewer than two examples.
        over_tasks: Its interval when the tasks are drawn anew, each with its mean score: what is known of *tasks like
            these*. `None` if there are fewer than two tasks, and for the figures of one task.
    """

    value: float
    over_examples: Interval | None = None
    over_tasks: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "value": self.value,
            "over_examples": self.over_examples and list(self.over_examples),
            "over_tasks": self.over_tasks and list(self.over_tasks),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Estimate:
        """Read what `to_dict` wrote."""
        return cls(data["value"], *(data[name] and tuple(data[name]) for name in ("over_examples", "over_tasks")))


def read_estimates(data: Mapping[str, Any]) -> dict[str, Estimate]:
    """Estimates by name, as `to_dict` wrote each."""
    return {name: Estimate.from_dict(estimate) for name, estimate in data.items()}


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: the percentile bootstrap, drawn by `scipy.stats.bootstrap`.

    Scores that are all alike, all right for one, give an interval of no width: the percentile bootstrap knows nothing
    of what it has not seen.

    Attributes:
        confidence: Share of the resamples that an interval holds.
        resamples: How many there are.
        seed: Their seed.
    """

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise EvaluationError(
                f"Intervals need a confidence between 0 and 1 and at least 1 resample, got {self.confidence} and "
                f"{self.resamples}."
            )

    def interval(self, values: np.ndarray) -> Interval | None:
        """The middle `confidence` of resampled values; `None` if one of them is not defined."""
        if not np.isfinite(values).all():
            return None
        tail = 50 * (1 - self.confidence)
        low, high = np.percentile(values, [tail, 100 - tail])
        return float(low), float(high)

    def distribution(self, sizes: Sequence[int], means: Callable[..., np.ndarray]) -> np.ndarray:
        """Draw indices into samples of the given sizes, each by itself, with replacement.

        Args:
            sizes: The samples' sizes.
            means: Takes an array (..., resample, size) of indices for each sample to an array (..., resample).

        Returns:
            What `means` gave for all resamples.
        """
        from scipy.stats import bootstrap

        drawn: np.ndarray = bootstrap(
            [np.arange(size) for size in sizes],
            lambda *indices, axis: means(*indices),
            n_resamples=self.resamples,
            batch=_RESAMPLES_AT_ONCE,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).bootstrap_distribution
        return drawn


class ScoreTable:
    """Per-example scores of several rows on several tasks, and what resampling makes of their means.

    All rows are scored on the same examples, so that one draw of examples serves them all and differences between rows
    are paired.

    Args:
        tables: Task -> its scores (row, example).
        resampling: How to resample.
    """

    def __init__(self, tables: Mapping[str, np.ndarray], resampling: Resampling) -> None:
        self.tasks = tuple(tables)
        self.resampling = resampling
        tables_of = list(tables.values())
        self._means = np.stack([table.mean(1) for table in tables_of], 1)
        self._over_examples: np.ndarray | None = None
        self._over_tasks: np.ndarray | None = None
        if all(table.shape[1] > 1 for table in tables_of):

            def drawn_examples(*indices: np.ndarray) -> np.ndarray:
                return np.stack([table[:, i].mean(-1) for table, i in zip(tables_of, indices, strict=True)], 1)

            self._over_examples = resampling.distribution([table.shape[1] for table in tables_of], drawn_examples)
        if len(tables_of) > 1:
            self._over_tasks = resampling.distribution(
                [len(tables_of)], lambda indices: self._means[:, indices].mean(-1)
            )

    def estimate(self, of_means: Callable[[np.ndarray], np.ndarray]) -> tuple[Estimate, dict[str, Estimate]]:
        """Estimate what can be computed from the rows' mean scores.

        Args:
            of_means: Takes mean scores (row, ...) to (...); nan where it is not defined.

        Returns:
            Its value for the means over the tasks, with intervals; and for each task by itself.
        """
        interval = self.resampling.interval
        examples = self._over_examples
        mean = Estimate(
            float(of_means(self._means.mean(1)[:, None])[0]),
            None if examples is None else interval(of_means(examples.mean(1))),
            None if self._over_tasks is None else interval(of_means(self._over_tasks)),
        )
        values = of_means(self._means)
        by_task = {
            task: Estimate(float(values[i]), None if examples is None else interval(of_means(examples[:, i])))
            for i, task in enumerate(self.tasks)
        }
        return mean, by_task
