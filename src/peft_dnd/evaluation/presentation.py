# SPDX-License-Identifier: Apache-2.0
"""A report's parts for readers: Markdown tables of rows, figures and facts, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .intervals import Estimate, Interval
from .readout import Row


_PLAIN_BAR, _OWN_BAR = "#9db4c8", "#3b6ea5"


def draw(rows: Sequence[Row], confidence: float, path: Path) -> None:
    """Draw rows as bars with their intervals over examples, into a PNG file.

    Args:
        rows: The rows, from top to bottom.
        confidence: Of the intervals.
        path: The file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

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
    axes.set_xlabel(f"mean score on {len(rows[0].by_task)} held-out tasks, {confidence:.0%} interval")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def rows_table(rows: Sequence[Row]) -> str:
    """One line a row: its mean score with both intervals, and its margin to the generated row."""
    lines = [
        "| | adapter | mean score | over examples | over tasks | generated minus this row |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        margin = "" if row.margin is None else f"{_number(row.margin.value)} {_interval(row.margin.over_examples)}"
        lines.append(
            f"| {row.number} | {row.label} | {_number(row.mean.value)} | {_interval(row.mean.over_examples)} | "
            f"{_interval(row.mean.over_tasks)} | {margin} |"
        )
    return "\n".join(lines)


def headlines(share_of_gap_closed: Estimate | None, conditioning_gain: Estimate | None) -> str:
    """The two headline figures, as a list."""
    return "\n".join(
        [
            f"- share of the gap from base to ceiling that is closed: {_estimate(share_of_gap_closed)}",
            f"- conditioning gain, generated minus the best of rows 9: {_estimate(conditioning_gain)}",
        ]
    )


def task_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """One line a task: its mean score in each row."""
    numbers = " | ".join(f"{row.number} {row.key.replace('_', ' ')}" for row in rows)
    lines = [f"| task | {numbers} |", f"| --- |{' ---: |' * len(rows)}"]
    for task in tasks:
        lines.append(f"| {task} | " + " | ".join(_number(row.by_task[task].value) for row in rows) + " |")
    return "\n".join(lines)


def facts_table(facts: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    """One line a fact of nested ones, without those of the names to leave out."""
    rows = [
        f"| {what} | {value:.4g} |" if isinstance(value, float) else f"| {what} | {value} |"
        for what, value in _flat(facts, leave_out).items()
    ]
    return "\n".join(["| what | value |", "| --- | ---: |", *rows])


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


def _flat(facts: Mapping[str, Any], leave_out: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Nested facts as one level: `{"fitting": {"seconds": 3}}` becomes `{"fitting: seconds": 3}`."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and name not in leave_out:
            flat.update(_flat(value, leave_out, f"{prefix}{name.replace('_', ' ')}: "))
        elif name not in leave_out and value is not None:
            flat[prefix + name.replace("_", " ")] = value
    return flat
