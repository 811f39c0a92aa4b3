# SPDX-License-Identifier: Apache-2.0
"""The worked example's report: a table, a plot, and the same as JSON and Markdown."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from peft_dnd.storage.files import staged_file, write_json, write_text


# Row in the report -> what a reader is told it is.
ROWS = {
    "base": "untouched base",
    "mean_adapter": "mean score of the training adapters",
    "average_weights": "average of the training adapters' weights",
    "nearest": "training adapter with the nearest prompts",
    "generated": "generated from the task's prompts",
    "shuffled": "generated from another task's prompts",
    "trained": "trained on the task itself",
}


def table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table: exact match on the held-out tasks, and what an adapter costs."""
    lines = [
        "| adapter | exact match, held-out tasks | seconds an adapter |",
        "| --- | ---: | ---: |",
    ]
    for row, words in ROWS.items():
        seconds = report["seconds_per_adapter"].get(row)
        cost = "-" if seconds is None else f"{seconds:.2f}"
        lines.append(f"| {words} | {report['held_out'][row]:.1%} | {cost} |")
    return "\n".join(lines)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md and report.png into a folder."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", _markdown(report))
    _plot(report, folder / "report.png")


def summarise(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Row -> task -> score, to row -> mean score."""
    return {row: fmean(of_task.values()) for row, of_task in scores.items()}


def _markdown(report: dict[str, Any]) -> str:
    seconds = "\n".join(f"| {what} | {value:.1f} |" for what, value in report["seconds"].items())
    tasks = "\n".join(
        f"| {task} | " + " | ".join(f"{report['held_out_by_task'][row][task]:.0%}" for row in ROWS) + " |"
        for task in report["held_out_by_task"]["base"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""# Worked example, seed {report["seed"]}

{table(report)}

Held-out tasks lent neither data nor adapters to the fit. Each score is the share of {report["questions_per_task"]}
questions a task that are answered exactly, letter by letter.

| held-out task | {" | ".join(ROWS)} |
| --- |{" ---: |" * len(ROWS)}
{tasks}

| what took time | seconds |
| --- | ---: |
{seconds}

Generator: {report["generator_parameters"]:,} parameters, for adapters of {report["adapter_parameters"]:,}.
Fitted on {report["training_tasks"]} tasks with {report["checkpoints_per_task"]} checkpoints each.
Versions: {versions}.
"""


def _plot(report: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    values = [100 * report["held_out"][row] for row in ROWS]
    colours = ["#3b6ea5" if row == "generated" else "#9db4c8" for row in ROWS]
    bars = axes.barh(list(ROWS.values()), values, color=colours)
    axes.bar_label(bars, labels=[f"{value:.1f}%" for value in values], padding=3)
    axes.set_xlim(0, 112)
    axes.set_xlabel("exact match on held-out tasks, %")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=120)
