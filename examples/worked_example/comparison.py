# SPDX-License-Identifier: Apache-2.0
"""The worked example's comparison: every kind of adapter, scored on the same questions of the held-out tasks."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean

from base import load_base
from peft import PeftModel
from tasks import score
from tqdm.auto import tqdm
from world import Task, World

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.evaluation import nearest_tasks


Scores = dict[str, dict[str, float]]


def compare(
    generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, world: World, folder: Path
) -> tuple[Scores, dict[str, float]]:
    """Score every kind of adapter on the held-out tasks.

    Args:
        generator: The fitted generator.
        pairs: The training tasks' pairs.
        world: The world.
        folder: Holds `base/`, `adapters/<task>/` (generated) and `trained/<task>/`.

    Returns:
        Row -> held-out task -> share of questions answered exactly; and row -> seconds to get one such adapter.
    """
    model, tokenizer = load_base(folder / "base")
    tasks = world.held_out_tasks
    questions = {task.name: world.scored_examples(task) for task in tasks}

    def on_all_tasks(of_model: object) -> dict[str, float]:
        return {task.name: score(of_model, tokenizer, questions[task.name]) for task in tasks}

    def saved(kind: str, task: Task, asked: Task) -> float:
        # Stock PEFT, as whoever gets the folder would load it.
        base, _ = load_base(folder / "base")
        return score(PeftModel.from_pretrained(base, folder / kind / task.name), tokenizer, questions[asked.name])

    scores: Scores = {"base": on_all_tasks(model)}
    seconds: dict[str, float] = {}

    began = time.perf_counter()
    average = GeneratedAdapter(pairs.layout, pairs.mean_state_dict(), {})
    seconds["average_weights"] = time.perf_counter() - began
    model = average.load_into(model)
    scores["average_weights"] = on_all_tasks(model)

    by_training_task = {}
    for name in tqdm(pairs.tasks, desc="scoring training adapters"):
        GeneratedAdapter(pairs.layout, pairs.state_dict(name), {}).load_into(model)
        by_training_task[name] = on_all_tasks(model)
    scores["mean_adapter"] = {
        task.name: fmean(of_task[task.name] for of_task in by_training_task.values()) for task in tasks
    }

    began = time.perf_counter()
    shelf = {name: pairs.prompts(name) for name in pairs.tasks}
    nearest = nearest_tasks(generator.text_encoder, {task.name: world.prompts(task) for task in tasks}, shelf)
    seconds["nearest"] = (time.perf_counter() - began) / len(tasks)
    scores["nearest"] = {task.name: by_training_task[nearest[task.name]][task.name] for task in tasks}

    others = dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
    scores["generated"] = {task.name: saved("adapters", task, task) for task in tasks}
    scores["shuffled"] = {task.name: saved("adapters", others[task], task) for task in tasks}
    scores["trained"] = {task.name: saved("trained", task, task) for task in tasks}
    return scores, seconds
