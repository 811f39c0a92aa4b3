# SPDX-License-Identifier: Apache-2.0
"""A report for readers: Markdown tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import ReportFigures
from .rows import row_label
from .statistics import Estimate, Interval


_PLAIN_BAR, _OWN_BAR = "#9db4c8", "#3b6ea5"


def markdown(report: ReportFigures) -> str:
    """Write a report as Markdown: the rows, the two headline figures, each task, costs, what is missing."""
    settings = report.settings
    parts = [
        f"# Evaluation on {len(report.tasks)} held-out task{'s' if len(report.tasks) > 1 else ''}",
        _rows_table(report),
        f"Mean over the tasks of their mean scores. Intervals are {settings['confidence']:.0%} percentile bootstrap, "
        f"{settings['resamples']} resamples: over the examples within each task, and over the tasks. "
        '"Generated minus this row" is paired by example.',
        _headlines(report),
        "## By task",
        _task_table(report),
    ]
    if report.not_measured:
        missing = [f"- {row_label(key)}: {why}" for key, why in report.not_measured.items()]
        parts += ["## Not measured", "\n".join(missing)]
    if report.costs:
        parts += ["## Costs", _facts(_flat(report.costs, leave_out=("by_report", "seconds_by_task")))]
    parts += ["## Settings", _facts(_flat(settings))]
    return "\n\n".join(parts) + "\n"


def draw(report: ReportFigures, path: Path) -> None:
    """Draw the rows as bars with their intervals over examples, into a PNG file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = list(report.rows.values())
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.2))
    axes = figure.subplots()
    labels = [f"{row.number}  {row.label.replace('*', '')}" for row in rows]
    values = [row.mean.value for row in rows]
    ends = [row.mean.over_examples or (row.mean.value, row.mean.value) for row in rows]
    bars = axes.barh(
        labels,
        values,
        xerr=[
            [max(v - low, 0) for v, (low, _) in zip(values, ends, strict=True)],
            [max(high - v, 0) for v, (_, high) in zip(values, ends, strict=True)],
        ],
        color=[_OWN_BAR if row.key == "generated" else _PLAIN_BAR for row in rows],
        error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2},
    )
    axes.bar_label(bars, labels=[_number(value) for value in values], padding=4, fontsize=8)
    axes.margins(x=0.14)
    axes.set_xlabel(f"mean score on {len(report.tasks)} held-out tasks, {report.settings['confidence']:.0%} interval")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _rows_table(report: ReportFigures) -> str:
    lines = [
        "| | adapter | mean score | over examples | over tasks | generated minus this row |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report.rows.values():
        margin = "" if row.margin is None else f"{_number(row.margin.value)} {_interval(row.margin.over_examples)}"
        lines.append(
            f"| {row.number} | {row.label} | {_number(row.mean.value)} | {_interval(row.mean.over_examples)} | "
            f"{_interval(row.mean.over_tasks)} | {margin} |"
        )
    return "\n".join(lines)


def _headlines(report: ReportFigures) -> str:
    return "\n".join(
        f"- {what}: {_estimate(estimate)}"
        for what, estimate in (
            ("share of the gap from base to ceiling that is closed", report.share_of_gap_closed),
            ("conditioning gain, generated minus the best of rows 9", report.conditioning_gain),
        )
    )


def _task_table(report: ReportFigures) -> str:
    numbers = " | ".join(f"{row.number} {row.key.replace('_', ' ')}" for row in report.rows.values())
    lines = [f"| task | {numbers} |", f"| --- |{' ---: |' * len(report.rows)}"]
    for task in report.tasks:
        lines.append(f"| {task} | " + " | ".join(_number(r.by_task[task].value) for r in report.rows.values()) + " |")
    return "\n".join(lines)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not defined"
    return (
        f"{_number(estimate.value)}, over examples {_interval(estimate.over_examples)}, "
        f"over tasks {_interval(estimate.over_tasks)}"
    )


def _number(value: float) -> str:
    return f"{value:.3f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{_number(interval[0])}, {_number(interval[1])}]"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {what} | {value:.4g} |" if isinstance(value, float) else f"| {what} | {value} |"
        for what, value in facts.items()
    ]
    return "\n".join(["| what | value |", "| --- | ---: |", *rows])


def _flat(facts: Mapping[str, Any], leave_out: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """Nested facts as one level: `{"fitting": {"seconds": 3}}` becomes `{"fitting: seconds": 3}`."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and name not in leave_out:
            flat.update(_flat(value, leave_out, f"{prefix}{name.replace('_', ' ')}: "))
        elif name not in leave_out and value is not None:
            flat[prefix + name.replace("_", " ")] = value
    return flat
