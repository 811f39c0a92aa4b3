# SPDX-License-Identifier: Apache-2.0
"""The held-out protocol: a generator's adapters scored beside everything that they must be compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn

from ..errors import EvaluationError
from ..pairs.dataset import PromptCheckpointDataset
from ..text.encoder import TextEncoder
from .bench import AdapterSource, Scorer, open_bench
from .held_out import AdapterGenerator, HeldOutTask
from .intervals import Resampling
from .report import EvaluationReport
from .rows import OTHER_PREFIX, PROTOCOL_ROWS
from .run import ProtocolRun


def evaluate_generator(
    generator: AdapterGenerator,
    base_model: nn.Module,
    training_pairs: PromptCheckpointDataset | None,
    tasks: Mapping[str, HeldOutTask],
    scorer: Scorer,
    *,
    in_context_scorer: Scorer | None = None,
    multi_task_adapter: AdapterSource | None = None,
    other_generators: Mapping[str, AdapterGenerator] | None = None,
    constant_prompt_set: Sequence[str] | None = None,
    text_encoder: TextEncoder | None = None,
    fitting_costs: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> EvaluationReport:
    """Run the held-out protocol.

    Every row is scored on the same examples by the same scorer. The rows, in `peft_dnd.evaluation.PROTOCOL_ROWS`:

    1. `base`: the untouched base.
    2. `in_context`: the base with in-context examples, by `in_context_scorer`.
    3. `training_adapters_mean`, `training_adapters_best`: the last checkpoint of each training task on each held-out
       task; the mean of their scores, and those of the best on each task, chosen knowing the scores.
    4. `average_weights`: the mean of the training tasks' mean checkpoints.
    5. `nearest`: the last checkpoint of the training task whose mean prompt embedding is nearest.
    6. `ridge`: [`RidgeBaseline`].
    7. `multi_task`: `multi_task_adapter`.
    8. `generated`: from each task's own prompts; and `generated_by_<name>` for each of `other_generators`.
    9. `shuffled`: from another held-out task's prompts, or, where only one is held out, a training task's; `junk`:
       from as many prompts of junk; `constant`: from `constant_prompt_set`.
    10. `trained`: each task's `trained_adapter`.

    A row that needs what was not given is left out and named in `not_measured`. Each adapter is generated once, with
    `seed`: there is no best of several draws.

    Args:
        generator: The fitted generator.
        base_model: The base model, without adapters. It carries the adapters one after another and is given back as
            it was.
        training_pairs: The pairs that the generator was fitted on, for rows 3 to 6; `None` if there are none.
        tasks: Name -> held-out task.
        scorer: `(model, task name) -> a score for each example`, larger is better, always the same examples in the
            same order. The model is a `PeftModel` around the base (the base itself in row 1), in evaluation mode; its
            layers are replaced inside `base_model`, so a scorer may as well use that object. It decodes as the task
            is used, with the base's chat template where it has one.
        in_context_scorer: The same for the base with examples of the task before each question.
        multi_task_adapter: One LoRA trained on all training tasks together.
        other_generators: Name -> another generator, to be scored in the same run, the paper's for one.
        constant_prompt_set: The prompts of the constant row; by default one of each training task.
        text_encoder: Reads the prompts for rows 5 and 6; by default the generator's.
        fitting_costs: What collecting and fitting cost, for the report: JSON values.
        skip: Keys of rows to leave out.
        seed: Of generation, junk, shuffling and resampling.
        confidence: Of the intervals.
        resamples: Of the bootstrap.

    Returns:
        The report.

    Raises:
        EvaluationError: If there are no held-out tasks, one of them is among the training tasks, the base has adapters
            already, a row to skip does not exist, or scores of two rows do not belong together.
        BaseModelMismatchError: If an adapter does not fit the base.
    """
    names = {f"{OTHER_PREFIX}{name}": other for name, other in (other_generators or {}).items()}
    _check(tasks, training_pairs, skip, {*PROTOCOL_ROWS, *names})
    resampling = Resampling(confidence, resamples, seed)
    with open_bench(base_model, scorer) as bench:
        run = ProtocolRun(bench, tasks, training_pairs, frozenset(skip), seed)
        run.base(in_context_scorer)
        run.training_adapters()
        run.average_weights()
        run.from_prompts(text_encoder or getattr(generator, "text_encoder", None))
        run.multi_task(multi_task_adapter)
        run.generated(generator)
        for key, other in names.items():
            run.other(key, other)
        run.controls(generator, constant_prompt_set)
        run.ceiling()
    costs = {**run.costs, "fitting": dict(fitting_costs or _known_costs(generator))}
    settings = {
        "training_tasks": 0 if training_pairs is None else len(training_pairs.tasks),
        "versions": {name: version(name) for name in ("peft-dnd", "peft", "transformers", "torch")},
    }
    return EvaluationReport.from_scores(
        run.scores,
        not_measured=run.not_measured,
        costs=costs,
        details=run.details,
        settings=settings,
        resampling=resampling,
    )


def _check(
    tasks: Mapping[str, HeldOutTask], pairs: PromptCheckpointDataset | None, skip: Collection[str], known: set[str]
) -> None:
    if not tasks:
        raise EvaluationError("There is no held-out task to evaluate on.")
    both = sorted(set(tasks) & set(pairs.tasks)) if pairs is not None else []
    if both:
        raise EvaluationError(
            f"{both[0]!r} is both held out and among the training tasks. Split the pairs by tasks: "
            "training, held_out = pairs.split([...])."
        )
    unknown = sorted(set(skip) - known)
    if unknown or isinstance(skip, str):
        raise EvaluationError(
            f"There is no row {skip if isinstance(skip, str) else unknown[0]!r} to skip. The rows: {sorted(known)}."
        )


def _known_costs(generator: AdapterGenerator) -> dict[str, Any]:
    known = getattr(getattr(generator, "config", None), "measured", {})
    return {name: known[name] for name in ("seconds of fitting", "steps", "training checkpoints") if name in known}
