# SPDX-License-Identifier: Apache-2.0
"""Judging generators on the hard world's held-out tasks, by the library's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base import load_base
from hard_world import Example, World
from tasks import answers_exactly
from torch import nn

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.evaluation import EvaluationReport, HeldOutTask, evaluate_generator


# Questions with answers that stand before the one that is asked, for the base without any adapter.
_SHOTS = 4


def judge(
    world: World,
    folder: Path,
    pairs: PromptCheckpointDataset,
    generators: dict[str, PromptConditionedLoraGenerator],
    seconds: dict[str, float],
) -> EvaluationReport:
    """Score everything on the same questions of the held-out tasks.

    Args:
        world: The world.
        folder: Holds `base/`, `trained/<task>/` and `multi_task/`.
        pairs: The training tasks' pairs.
        generators: `"generator"`, and others to compare it with.
        seconds: What the stages took.
    """
    base, tokenizer = load_base(folder / "base")
    tasks = {task.name: task for task in world.held_out_tasks}
    questions = {name: world.scored_examples(task) for name, task in tasks.items()}
    shown = {name: world.training_examples(task)[:_SHOTS] for name, task in tasks.items()}

    def scorer(model: nn.Module, task: str) -> list[float]:
        return [float(right) for right in answers_exactly(model, tokenizer, questions[task])]

    def in_context_scorer(model: nn.Module, task: str) -> list[float]:
        asked = [Example(_after(shown[task], each.prompt), each.answer) for each in questions[task]]
        return [float(right) for right in answers_exactly(model, tokenizer, asked)]

    others = {name: generator for name, generator in generators.items() if name != "generator"}
    return evaluate_generator(
        generators["generator"],
        base,
        pairs,
        {
            name: HeldOutTask(world.prompts(task), trained_adapter=folder / "trained" / name, kind=kind_of(task))
            for name, task in tasks.items()
        },
        scorer,
        in_context_scorer=in_context_scorer,
        multi_task_adapter=folder / "multi_task",
        other_generators=others,
        fitting_costs=_costs(seconds),
        seed=world.seed,
    )


def kind_of(task: Any) -> str | None:
    """What a task wants: in the hard world two tasks that differ in their prompts want the same."""
    return str(task.behaviour) if hasattr(task, "behaviour") else None


def _after(shown: Sequence[Example], prompt: str) -> str:
    return "\n".join([*(f"{example.prompt}\n{example.answer}" for example in shown), prompt])


def _costs(seconds: dict[str, float]) -> dict[str, Any]:
    return {f"seconds of {what}": round(value, 1) for what, value in seconds.items()}
