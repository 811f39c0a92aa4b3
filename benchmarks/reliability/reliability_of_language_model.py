# SPDX-License-Identifier: Apache-2.0
"""The points of the language model's world, from what a judged run of `language_model/run.py` has left."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from language_model.judging import KINDS, Size, draw_questions
from language_model.parts import Part
from language_model.report import LEAST_CEILING
from language_model.rows import prompt_of
from language_model.run import load_generator
from language_model.tasks import Task
from language_model.world import World, build_world
from points import Point, agreement_of, mean_adapter, score_of
from tqdm.auto import tqdm

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.storage.files import read_json


# The entries that were scored with an adapter generated from a task's own prompts, and in which wording those were.
WORDINGS = {"generated": False, "generated_other_wording": True}


def points_of_language_model(folder: Path, base: Path, data: list[Path], seed: int) -> tuple[list[Point], World, Any]:
    """Two points for each held-out task that its own LoRA can do, one for each wording of its prompts.

    Args:
        folder: What the judged run has left, `.../seed-N`.
        base: The base, as that run wrote it.
        data: Folders of further tasks, as in that run.
        seed: The run's seed.
    """
    settings = read_json(folder / "settings.json")
    world = build_world(seed, data)
    part = Part(world, training=settings["training_tasks"])
    questions = draw_questions(part, Size(**settings["asked"]), seed)
    generator = load_generator(str(folder / "fitting" / "generator"), base)
    mean = mean_adapter(generator)
    points = []
    for kind in (kind for kind in KINDS if kind in questions):
        found = {
            key: read_json(folder / "scores" / kind / f"{key}.json")["scores"]
            for key in ("base", "trained", "choosing", *WORDINGS)
        }
        for asked in tqdm(questions[kind], desc=kind):
            name = asked.task.name
            if fmean(found["choosing"][name]) < LEAST_CEILING:
                continue
            for key, other in WORDINGS.items():
                prompts = asked.prompts[asked.other if other else asked.wording]
                score, threshold = score_of(generator, prompts)
                points.append(
                    Point(
                        task=name,
                        kind=kind.replace("_", " "),
                        score=score,
                        threshold=threshold,
                        agreement=agreement_of(generator.generate_adapter, prompts, mean),
                        base=fmean(found["base"][name]),
                        generated=fmean(found[key][name]),
                        trained=fmean(found["trained"][name]),
                    )
                )
    return points, world, generator


def false_alarms(
    world: World, generator: PromptConditionedLoraGenerator, kinds: list[str], tasks: int, size: int
) -> dict[str, Any]:
    """Of tasks of some kinds, the share above the derived threshold, and above 0.95.

    Args:
        world: The world.
        generator: The generator.
        kinds: The kinds.
        tasks: How many tasks of each are looked at.
        size: Prompts of each, in one wording.
    """
    found = {}
    for kind in kinds:
        of_kind: list[Task] = sorted(world.of(kind), key=lambda task: random.Random(task.name).random())[:tasks]
        scores = []
        for task in tqdm(of_kind, desc=f"scoring {kind}"):
            draw = random.Random(f"prompts {task.name}")
            told = draw.choice(task.instructions("unseen" if kind == "new_wordings" else "seen"))
            chosen = draw.sample(task.train, min(size, len(task.train)))
            scores.append(score_of(generator, [prompt_of(told, one.input) for one in chosen]))
        found[kind.replace("_", " ")] = {
            "tasks": len(scores),
            "above the derived threshold": round(fmean(score > threshold for score, threshold in scores), 4),
            "above 0.95": round(fmean(score > 0.95 for score, _ in scores), 4),
            "quantiles of the score": torch.tensor([score for score, _ in scores])
            .quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
            .tolist(),
        }
    return found
