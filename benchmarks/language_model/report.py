# SPDX-License-Identifier: Apache-2.0
"""What the judging found: a report for each kind of held-out task, and tables to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from language_model.judging import KINDS
from peft_dnd.evaluation import EvaluationReport, Resampling


# A task that its own LoRA gets right in fewer cases is one that a base of this size cannot do; fixed beforehand.
LEAST_CEILING = 0.5
LABELS = {
    "base": "base, input alone",
    "base_instruction": "base, instruction in its window",
    "in_context": "base, 4 solved examples in its window",
    "in_context_16": "base, 16 solved examples in its window",
    "in_context_instruction": "base, instruction and 4 solved examples",
    "average_weights": "mean of training tasks' own LoRAs",
    "multi_task": "one LoRA for all training tasks, instruction in its window",
    "multi_task_other_wording": "the same, the other wording",
    "generated": "**generated, input alone**",
    "generated_other_wording": "the same, prompts in the other wording",
    "generated_beside": "generated, instruction in its window too",
    "shuffled": "generated from another task's prompts",
    "trained": "the task's own LoRA",
}
KIND_LABELS = {kind: kind.replace("_", " ") for kind in KINDS}
Found = Mapping[str, Mapping[str, Any]]


def report_of(found: Found, resampling: Resampling | None = None) -> dict[str, Any]:
    """The report of one kind.

    Args:
        found: Entry -> what `score_all` gives for it.
        resampling: How intervals are made.

    Returns:
        How many tasks were asked and which are not counted; for each row its mean over the counted tasks with
        intervals, what generated adapters are above it, its mean over all tasks, and the tokens read for a question;
        share of the gap closed and conditioning gain.
    """
    # Without own LoRAs all tasks count.
    chosen_by = found["choosing"]["scores"] if "choosing" in found else {key: [1] for key in found["base"]["scores"]}
    ceiling = {task: sum(of) / len(of) for task, of in chosen_by.items()}
    kept = [task for task, share in ceiling.items() if share >= LEAST_CEILING]
    rows = [key for key in LABELS if key in found]
    report: dict[str, Any] = {
        "tasks": len(ceiling),
        "counted": len(kept),
        "left_out": sorted(set(ceiling) - set(kept)),
        "rows": {
            key: {
                "label": LABELS[key],
                "tokens_read": found[key]["tokens_read"],
                "seconds": found[key]["seconds"],
                "over_all_tasks": _mean(found[key]["scores"]),
            }
            for key in rows
        },
    }
    if not kept:
        return report
    scores = {key: {task: list(map(float, found[key]["scores"][task])) for task in kept} for key in rows}
    evaluated = EvaluationReport.from_scores(scores, resampling=resampling)
    for key in rows:
        row = evaluated.row(key)
        report["rows"][key] |= {
            "mean": row.mean.to_dict(),
            "generated_minus_this": None if row.margin is None else row.margin.to_dict(),
            "by_task": {task: estimate.value for task, estimate in row.by_task.items()},
        }
    for name in ("share_of_gap_closed", "conditioning_gain"):
        estimate = getattr(evaluated, name)
        report[name] = None if estimate is None else estimate.to_dict()
    return report


def reports_of(found: Mapping[str, Found], resampling: Resampling | None = None) -> dict[str, dict[str, Any]]:
    """The report of each kind."""
    return {kind: report_of(of, resampling) for kind, of in found.items()}


def costs_of(found: Mapping[str, Found], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Seconds and bytes of a generated adapter, and the seconds of each stage."""
    generated = [of["generated"] for of in found.values()]
    return {
        "seconds_an_adapter": sum(one["seconds_an_adapter"] for one in generated) / len(generated),
        "bytes_an_adapter": generated[0]["bytes_an_adapter"],
        "seconds_of_stages": {name: round(value, 1) for name, value in seconds.items()},
    }


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The reports as a table of Markdown: a column for each kind, in percent, with intervals over tasks."""
    kinds = list(reports)
    heads = [f"{KIND_LABELS[kind]} ({reports[kind]['counted']} of {reports[kind]['tasks']})" for kind in kinds]
    lines = [_line(["exact match, %", *heads, "tokens read"]), _line(["---", *(["---:"] * (len(kinds) + 1))])]
    for key in LABELS:
        rows = [reports[kind]["rows"].get(key, {}) for kind in kinds]
        if not any(rows):
            continue
        read = [row["tokens_read"] for row in rows if row]
        lines.append(
            _line([LABELS[key], *(_percent(row.get("mean")) for row in rows), f"{sum(read) / len(read):.0f}"])
        )
    for name, label in (
        ("share_of_gap_closed", "share of the gap closed"),
        ("conditioning_gain", "conditioning gain"),
    ):
        estimates = [reports[kind].get(name) for kind in kinds]
        if any(estimates):
            lines.append(_line([label, *map(_percent, estimates), ""]))
    return "\n".join(lines)


def _percent(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    value, interval = 100 * estimate["value"], estimate["over_tasks"] or estimate["over_examples"]
    return f"{value:.1f}" if interval is None else f"{value:.1f} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(scores: Mapping[str, Sequence[int]]) -> float:
    return sum(sum(of) / len(of) for of in scores.values()) / len(scores)
