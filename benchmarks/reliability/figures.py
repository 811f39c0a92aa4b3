# SPDX-License-Identifier: Apache-2.0
"""Whether a score foretells what an adapter will do: rank correlations, what a threshold keeps, and the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from points import Point
from scipy.stats import spearmanr

from peft_dnd.storage.files import staged_file


RESAMPLES = 2000
EDGES = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
PREDICTORS: dict[str, Callable[[Point], float]] = {
    "score": lambda point: -point.score,
    "agreement of halves": lambda point: point.agreement,
}


def figures_of(points: Sequence[Point]) -> dict[str, Any]:
    """All figures of a world's points; those without a gap to close are left out."""
    kept = [point for point in points if point.share is not None]
    return {
        "adapters": len(kept),
        "tasks": len({point.task for point in kept}),
        "without_a_gap": sorted({point.task for point in points if point.share is None}),
        "rank_correlation_with_share_of_gap_closed": {
            name: {"all": correlation(kept, of), "within_kinds": within_kinds(kept, of)}
            for name, of in PREDICTORS.items()
        },
        "at_the_threshold": at_threshold(kept),
        "bins": bins(kept),
        "kinds": {kind: summary([p for p in kept if p.kind == kind]) for kind in dict.fromkeys(p.kind for p in kept)},
    }


def correlation(points: Sequence[Point], of: Callable[[Point], float]) -> dict[str, Any]:
    """Spearman's rank correlation, with an interval from resampled tasks: positive where the predictor is right."""
    value = _spearman(points, of)
    tasks = sorted({point.task for point in points})
    by_task = {task: [point for point in points if point.task == task] for task in tasks}
    draw = np.random.default_rng(0)
    found = [
        _spearman([p for i in draw.integers(len(tasks), size=len(tasks)) for p in by_task[tasks[i]]], of)
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return {"value": _rounded(value), "interval": [_rounded(low), _rounded(high)]}


def within_kinds(points: Sequence[Point], of: Callable[[Point], float]) -> float | None:
    """The mean over the kinds of five points or more, weighted by these: what is left once the kind is known."""
    kinds = [[p for p in points if p.kind == kind] for kind in {p.kind for p in points}]
    found = [(len(part), _spearman(part, of)) for part in kinds if len(part) >= 5]
    found = [(count, value) for count, value in found if not np.isnan(value)]
    total = sum(count for count, _ in found)
    return _rounded(sum(count * value for count, value in found) / total) if total else None


def at_threshold(points: Sequence[Point]) -> dict[str, Any]:
    """What the default threshold keeps and turns away."""
    below = [p for p in points if p.score <= p.threshold]
    above = [p for p in points if p.score > p.threshold]
    return {"thresholds": [_rounded(t) for t in sorted({p.threshold for p in points})][:8]} | {
        name: summary(part) for name, part in (("below", below), ("above", above))
    }


def bins(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The reliability table: of adapters of about one score, how much of the gap they close."""
    found = []
    for low, high in pairwise(EDGES):
        part = [p for p in points if low <= p.score < high or (high == EDGES[-1] and p.score == high)]
        found.append({"from": low, "to": high, **summary(part)})
    return found


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """How many, their mean score, and the share of the gap that they close, with an interval from resampled points."""
    if not points:
        return {"adapters": 0}
    shares = np.array([point.share for point in points], dtype=float)
    draw = np.random.default_rng(0)
    means = shares[draw.integers(len(shares), size=(RESAMPLES, len(shares)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "adapters": len(points),
        "mean_score": _rounded(fmean(point.score for point in points)),
        "share_of_gap_closed": _rounded(shares.mean()),
        "interval": [_rounded(low), _rounded(high)],
    }


def draw(title: str, points: Sequence[Point], figures: dict[str, Any], path: Path) -> None:
    """The reliability plot: every adapter, and the mean of each bin of the score."""
    figure = Figure(figsize=(8.4, 4.4))
    axes = figure.subplots()
    kept = [point for point in points if point.share is not None]
    for kind in dict.fromkeys(point.kind for point in kept):
        part = [point for point in kept if point.kind == kind]
        axes.scatter([p.score for p in part], [p.share for p in part], s=14, alpha=0.55, label=kind)
    full = [one for one in figures["bins"] if one["adapters"]]
    middle = [one["mean_score"] for one in full]
    value = [one["share_of_gap_closed"] for one in full]
    spread = np.array([[v - one["interval"][0], one["interval"][1] - v] for v, one in zip(value, full, strict=True)]).T
    axes.errorbar(middle, value, yerr=spread.clip(0), color="black", marker="s", capsize=3, label="mean of a bin")
    axes.axvline(fmean(p.threshold for p in kept), color="#999999", linestyle="--", linewidth=1, label="threshold")
    axes.set(title=title, xlabel="out-of-distribution score", ylabel="share of the gap closed", xlim=(-0.02, 1.02))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=110)


def _spearman(points: Sequence[Point], of: Callable[[Point], float]) -> float:
    values, shares = [of(point) for point in points], [point.share for point in points]
    if len(set(values)) < 2 or len(set(shares)) < 2:
        return float("nan")
    return float(spearmanr(values, shares).statistic)


def _rounded(value: float) -> float:
    return round(float(value), 4)
