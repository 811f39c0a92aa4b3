# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: made of scores, merged, saved and read back, shown, put into a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptFileError, EvaluationError, FormatVersionError
from ..generator.model_card import EVALUATION
from ..generator.modeling import PromptConditionedLoraGenerator
from ..storage.files import PathLike, read_json, staged_file, write_text
from .intervals import Estimate, Resampling, ScoreTable, read_estimates
from .presentation import draw, facts_table, headlines, rows_table, task_table
from .readout import Row, RowReader, Scores, score_tables
from .rows import in_order, row_label


FORMAT_VERSION = 1
REPORT_NAME = "evaluation.json"
MARKDOWN_NAME = "evaluation.md"
PLOT_NAME = "evaluation.png"

_LIST_OF_NUMBERS = re.compile(r"\[\s+((?:[-+.\deE]+,\s+)*[-+.\deE]+)\s+\]")


@dataclass(frozen=True)
class EvaluationReport:
    """What a generator's adapters are worth on held-out tasks, beside what they must be compared with.

    Made by [`evaluate_generator`], or from scores measured elsewhere by
    [`from_scores`][EvaluationReport.from_scores].

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

    @classmethod
    def from_scores(
        cls,
        scores: Scores,
        *,
        not_measured: Mapping[str, str] | None = None,
        costs: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        resampling: Resampling | None = None,
    ) -> EvaluationReport:
        """Make a report of measured scores.

        Args:
            scores: Row -> task -> a score for each example, larger is better. All rows have the same tasks and, for
                each, the same examples in the same order, so that they can be compared in pairs.
            not_measured: See the class.
            costs: See the class.
            details: See the class.
            settings: See the class.
            resampling: How intervals are made.

        Raises:
            EvaluationError: If there are no scores, or rows differ in their tasks or numbers of examples, or a score
                is not finite.
        """
        resampling = resampling or Resampling()
        keys = in_order(list(scores))
        table = ScoreTable(score_tables(scores, keys), resampling)
        tasks, reader = table.tasks, RowReader(keys, table)
        rows = {key: reader.row(key) for key in keys}
        gap, gap_by_task = reader.share_of_gap_closed()
        gain, gain_by_task = reader.conditioning_gain()
        return cls(
            tasks=tasks,
            rows=rows,
            not_measured=dict(not_measured or {}),
            share_of_gap_closed=gap,
            share_of_gap_closed_by_task=gap_by_task,
            conditioning_gain=gain,
            conditioning_gain_by_task=gain_by_task,
            costs=_as_json(costs or {}),
            details=_as_json(details or {}),
            settings=_as_json({**(settings or {}), **asdict(resampling)}),
            scores={key: {task: tuple(map(float, scores[key][task])) for task in tasks} for key in keys},
        )

    @classmethod
    def merge(cls, reports: Sequence[EvaluationReport]) -> EvaluationReport:
        """Put reports on different tasks together to one over all of them.

        A row that some of the reports lack cannot be compared with the others and is left out, by name.

        Args:
            reports: Reports with their scores, of different tasks, made with the same settings for intervals.

        Raises:
            EvaluationError: If two reports have a task in common, or one has no scores, or there are none.
        """
        if not reports or any(report.scores is None for report in reports):
            raise EvaluationError(
                "Only reports that hold their per-example scores can be merged, at least one of them."
            )
        tasks = [task for report in reports for task in report.tasks]
        if len(set(tasks)) < len(tasks):
            raise EvaluationError(f"Reports that are merged must be of different tasks, got {tasks}.")
        first = reports[0].settings
        resampling = Resampling(first["confidence"], first["resamples"], first["seed"])
        kept = [key for key in reports[0].rows if all(key in report.rows for report in reports)]
        scores = {key: {t: (r.scores or {})[key][t] for r in reports for t in r.tasks} for key in kept}
        missing: dict[str, str] = {}
        for report in reports:
            missing.update({key: why for key, why in report.not_measured.items() if key not in missing})
            missing.update({key: "measured on some of the tasks only" for key in report.rows if key not in kept})
        return cls.from_scores(
            scores,
            not_measured=missing,
            costs={"by_report": {", ".join(r.tasks): dict(r.costs) for r in reports}, **_mean_costs(reports)},
            details={"by_report": {", ".join(r.tasks): dict(r.details) for r in reports}},
            settings={**first, "merged_reports": len(reports)},
            resampling=resampling,
        )

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

    def to_dict(self, *, include_scores: bool = True) -> dict[str, Any]:
        """The report as JSON values.

        Args:
            include_scores: Whether the per-example scores are among them; without, it cannot be merged again.
        """
        data = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        return {"format_version": FORMAT_VERSION, **data, **({} if include_scores else {"scores": None})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """Read what [`to_dict`][EvaluationReport.to_dict] wrote.

        Raises:
            FormatVersionError: If a newer version of the library wrote it.
            CorruptFileError: If something is missing.
        """
        if data.get("format_version", 0) > FORMAT_VERSION:
            raise FormatVersionError(
                f"This evaluation is of format version {data['format_version']}; this version of peft_dnd reads up "
                f"to {FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-dnd"
            )
        try:
            return cls(
                tasks=tuple(data["tasks"]),
                rows={key: Row.from_dict(key, row) for key, row in data["rows"].items()},
                not_measured=data["not_measured"],
                share_of_gap_closed=_estimate(data["share_of_gap_closed"]),
                share_of_gap_closed_by_task=read_estimates(data["share_of_gap_closed_by_task"]),
                conditioning_gain=_estimate(data["conditioning_gain"]),
                conditioning_gain_by_task=read_estimates(data["conditioning_gain_by_task"]),
                costs=data["costs"],
                details=data["details"],
                settings=data["settings"],
                scores=None
                if data["scores"] is None
                else {key: {task: tuple(s) for task, s in of.items()} for key, of in data["scores"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"This is no evaluation report, or part of one: {error!r}. Restore the file, or evaluate again."
            ) from error

    def save(self, folder: PathLike, *, include_scores: bool = True) -> None:
        """Write `evaluation.json`, `evaluation.md` and, where matplotlib is installed, `evaluation.png`.

        Args:
            folder: Where; made if missing.
            include_scores: See [`to_dict`][EvaluationReport.to_dict].
        """
        folder = Path(folder)
        try:
            with staged_file(folder / PLOT_NAME) as staged:
                draw(list(self.rows.values()), self.settings["confidence"], staged)
        except ImportError:
            (folder / PLOT_NAME).unlink(missing_ok=True)
        write_text(folder / MARKDOWN_NAME, self.to_markdown())
        # The JSON comes last: where it is, the rest is.
        text = json.dumps(self.to_dict(include_scores=include_scores), indent=2, ensure_ascii=False)
        write_text(folder / REPORT_NAME, _LIST_OF_NUMBERS.sub(_on_one_line, text) + "\n")

    @classmethod
    def load(cls, folder: PathLike) -> EvaluationReport:
        """Read the report that [`save`][EvaluationReport.save] wrote into a folder.

        Raises:
            FileNotFoundError: If there is none.
            CorruptFileError: If it is unreadable.
            FormatVersionError: If a newer version of the library wrote it.
        """
        return cls.from_dict(read_json(Path(folder) / REPORT_NAME))

    def to_markdown(self) -> str:
        """The report as Markdown: the rows, the two headline figures, each task, what is missing, costs, settings."""
        rows, settings = list(self.rows.values()), self.settings
        parts = [
            f"# Evaluation on {len(self.tasks)} held-out task{'s' if len(self.tasks) > 1 else ''}",
            rows_table(rows),
            f"Mean over the tasks of their mean scores. Intervals are {settings['confidence']:.0%} percentile "
            f"bootstrap, {settings['resamples']} resamples: over the examples within each task, and over the tasks. "
            '"Generated minus this row" is paired by example.',
            headlines(self.share_of_gap_closed, self.conditioning_gain),
            "## By task",
            task_table(rows, self.tasks),
        ]
        if self.not_measured:
            missing = [f"- {row_label(key)}: {why}" for key, why in self.not_measured.items()]
            parts += ["## Not measured", "\n".join(missing)]
        if self.costs:
            parts += ["## Costs", facts_table(self.costs, leave_out=("by_report", "seconds_by_task"))]
        parts += ["## Settings", facts_table(settings)]
        return "\n\n".join(parts) + "\n"

    def model_card_rows(self) -> dict[str, Any]:
        """What a model card shows of it, as JSON values: see `peft_dnd.generator.model_card`."""
        return {
            "tasks": list(self.tasks),
            "confidence": self.settings["confidence"],
            "rows": [[row.label, row.number, row.mean.value, row.mean.over_examples] for row in self.rows.values()],
            "share_of_gap_closed": _brief(self.share_of_gap_closed),
            "conditioning_gain": _brief(self.conditioning_gain),
            "not_measured": {row_label(key): why for key, why in self.not_measured.items()},
        }

    def attach_to(self, generator: PromptConditionedLoraGenerator) -> None:
        """Have a generator carry the report's rows in its configuration and model card from the next save on."""
        generator.config.measured[EVALUATION] = _as_json(self.model_card_rows())


def _mean_costs(reports: Sequence[EvaluationReport]) -> dict[str, float]:
    names = set.intersection(*(set(report.costs) for report in reports))
    numbers = {name: [report.costs[name] for report in reports] for name in sorted(names)}
    return {
        name: float(np.mean(values))
        for name, values in numbers.items()
        if all(isinstance(value, int | float) for value in values)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate | Row):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(of) for key, of in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _estimate(data: Mapping[str, Any] | None) -> Estimate | None:
    return None if data is None else Estimate.from_dict(data)


def _brief(estimate: Estimate | None) -> list[Any] | None:
    return None if estimate is None else [estimate.value, estimate.over_examples]


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(data), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"Costs, details and settings of a report must be JSON: {error}.") from error


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + ", ".join(number.strip() for number in match[1].split(",")) + "]"
