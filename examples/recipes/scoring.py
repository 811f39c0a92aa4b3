# SPDX-License-Identifier: Apache-2.0
"""Scoring with the lm-evaluation-harness, and the report of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from recipe import Recipe
from torch import nn

from peft_dnd.evaluation import EvaluationReport, HarnessScorer
from peft_dnd.storage.files import read_json, write_json


@dataclass(frozen=True)
class RecipeScorer:
    """Scores a model on a recipe's held-out sets, each by its own task of the harness.

    Args:
        recipe: The recipe.
        processor: The base model's tokenizer or processor.
        images: Whether the base reads images.
        folder: Where scores are kept, so that the same adapter is not scored twice on a set, and an interrupted
            evaluation goes on.
        shots: How many solved examples stand before each question; by default as each set says.
    """

    recipe: Recipe
    processor: Any
    images: bool
    folder: Path
    shots: int | None = None

    def __call__(self, model: nn.Module, task: str) -> Sequence[float]:
        """Score a model on a held-out set, example by example."""
        shots = "" if self.shots is None else f"-{self.shots}-shots"
        path = self.folder / f"{task}{shots}-{_digest(model)}.json"
        if not path.is_file():
            write_json(path, list(self._score(model, task)))
        return list(read_json(path))

    def _score(self, model: nn.Module, task: str) -> Sequence[float]:
        scoring = self.recipe.sets[task].scoring
        assert scoring is not None  # a recipe with an unscored held-out set is refused when it is read
        if scoring.runs_code:
            # Whoever runs a recipe with such a set wants its code run; the harness asks twice.
            os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
        scorer = HarnessScorer(
            self.processor,
            {task: scoring.task},
            metric=scoring.metric,
            filter_name=scoring.filter,
            num_fewshot=scoring.num_fewshot if self.shots is None else self.shots,
            limit=self.recipe.evaluation.limit,
            batch_size=self.recipe.evaluation.batch_size,
            task_manager=task_manager(),
            seed=self.recipe.seed,
            images=self.images,
            run_code=scoring.runs_code,
            max_new_tokens=self.recipe.evaluation.max_answer_tokens,
        )
        return scorer(model, task)


def _digest(model: nn.Module) -> str:
    """A name for the adapter that a model has, by its weights."""
    if not isinstance(model, PeftModel):
        return "base"
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def task_manager() -> Any:
    """The harness' index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def shots_table(measured: Mapping[str, Mapping[str, Any]], report: EvaluationReport) -> str:
    """Few-shot tuning and in-context learning beside the report's rows, as Markdown.

    Args:
        measured: Row -> `{"scores": {task: [score of each example]}, "seconds": ...}`.
        report: The protocol's report on the same tasks.
    """
    tasks = report.tasks
    lines = ["| | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
    for key in ("base", "generated", "trained"):
        if key in report.rows:
            of = report.rows[key].by_task
            lines.append(f"| {report.rows[key].label} | " + " | ".join(f"{of[t].value:.1%}" for t in tasks) + " |")
    for row, found in measured.items():
        of_task = found["scores"]
        cells = [f"{fmean(of_task[task]):.1%}" if task in of_task else "-" for task in tasks]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overhead_table(
    measured: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float], report: EvaluationReport
) -> str:
    """What it takes to get an adapter, and what it takes once to get the generator, as Markdown.

    Args:
        measured: As for [`shots_table`].
        seconds: What took time -> seconds: `"collecting"`, `"fitting"` and `"full-shot tuning"`, the last for one
            task.
        report: The protocol's report.
    """
    generated = float(report.costs["seconds_to_generate"])
    lines = ["| to get one adapter | seconds |", "| --- | ---: |", f"| generated from prompts | {generated:.3g} |"]
    lines += [f"| {row} | {found['seconds']:.3g} |" for row, found in measured.items() if "tuning" in row]
    full = seconds.get("full-shot tuning")
    if full is not None:
        lines.append(f"| full-shot tuning | {full:.3g} |")
    lines += ["", "| instead of an adapter | seconds more for each question |", "| --- | ---: |"]
    lines += [f"| {row} | {found['seconds']:.3g} |" for row, found in measured.items() if "tuning" not in row]
    once = seconds["collecting"] + seconds["fitting"]
    lines += ["", "| once | seconds |", "| --- | ---: |"]
    lines += [f"| {what} | {seconds[what]:.3g} |" for what in ("collecting", "fitting")]
    text = "\n".join(lines) + "\n"
    if full is not None and full > generated:
        text += f"\nGenerating pays, against full-shot tuning, from {once / (full - generated):.0f} tasks on.\n"
    return text
