# SPDX-License-Identifier: Apache-2.0
"""Leave-one-out: each task held out in turn, and a generator fitted anew without it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from ..errors import EvaluationError
from ..pairs.dataset import PromptCheckpointDataset
from ..storage.files import PathLike, read_json, write_json
from .report import REPORT_NAME, EvaluationReport


logger = logging.getLogger(__name__)
GeneratorT = TypeVar("GeneratorT")
_PLAN_NAME = "leave_one_out.json"


def leave_one_out(
    pairs: PromptCheckpointDataset,
    fit: Callable[[PromptCheckpointDataset, str], GeneratorT],
    evaluate: Callable[[GeneratorT, PromptCheckpointDataset, str], EvaluationReport],
    *,
    tasks: Iterable[str] | None = None,
    folder: PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Hold out each task in turn, fit a generator to all others, and evaluate it on the one held out.

    With a folder each report is kept as soon as it is there, and a run that was interrupted goes on after the last
    one; the merged report is saved there as well.

    Args:
        pairs: All tasks.
        fit: `(pairs of the other tasks, held-out task) -> generator`. It must use nothing of the held-out task, early
            stopping included.
        evaluate: `(generator, pairs of the other tasks, held-out task) -> report` on just that task, by
            [`evaluate_generator`] for one.
        tasks: The tasks to hold out; all by default.
        folder: Where the reports are kept; each task's in a folder of its own.
        settings: JSON values that say what `fit` and `evaluate` do. A folder of another run, with other settings or
            training tasks, is refused, so that no report of old settings is passed off as new.

    Returns:
        One report over all held-out tasks; its costs and details have those of each task under `by_report`.

    Raises:
        PairsFolderError: If there is no task of such a name, or only one task at all.
        EvaluationError: If the folder belongs to another run, or a report is not of just its task.
    """
    held_out = list(pairs.tasks if tasks is None else tasks)
    root = None if folder is None else Path(folder)
    if root is not None:
        _check_plan(root, {"tasks": list(pairs.tasks), "settings": dict(settings or {})})
    reports = []
    for task in transformers_logging.tqdm(held_out, desc="held-out tasks"):
        kept = None if root is None else root / _folder_name(pairs, task)
        if kept is not None and (kept / REPORT_NAME).is_file():
            report = EvaluationReport.load(kept)
            logger.info("The report on %r is there already.", task)
        else:
            training, _ = pairs.split([task])
            report = evaluate(fit(training, task), training, task)
            if report.tasks != (task,):
                raise EvaluationError(
                    f"The report on held-out task {task!r} is on {report.tasks}; expected just that task."
                )
            if kept is not None:
                report.save(kept)
        reports.append(report)
    merged = EvaluationReport.merge(reports)
    if root is not None:
        merged.save(root)
    return merged


def _folder_name(pairs: PromptCheckpointDataset, task: str) -> str:
    # Names of tasks may hold signs that folders may not, or differ in nothing else.
    return f"{pairs.tasks.index(task):03d}-{re.sub(r'[^A-Za-z0-9_-]+', '-', task)[:60]}"


def _check_plan(root: Path, plan: Mapping[str, Any]) -> None:
    path = root / _PLAN_NAME
    if not path.is_file():
        write_json(path, plan)
    elif read_json(path) != plan:
        raise EvaluationError(
            f"{str(root)!r} holds the reports of a leave-one-out over other tasks or with other settings: "
            f"{read_json(path)}, not {dict(plan)}. Name another folder, or remove that one."
        )
