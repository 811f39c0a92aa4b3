# SPDX-License-Identifier: Apache-2.0
"""The points of the worked example, from what runs of `examples/worked_example/run.py` have left.

Each held-out task's adapter is generated from its own prompts, and from those with a share of them replaced by text of
no task: so the score is held against the loss of accuracy where one knows what went wrong, and how much of it.
"""

from __future__ import annotations

import random
from pathlib import Path

from base import load_base
from peft import PeftModel
from points import Point, agreement_of, mean_adapter, score_of
from strange_prompts import strange_prompts
from tasks import score
from tqdm.auto import tqdm
from world import build_world

from peft_dnd import PromptConditionedLoraGenerator


# How much of a task's prompts is replaced, and by what.
SHARES = (0.25, 0.5, 0.75, 1.0)
STRANGE = ("keyboard", "other languages", "the tasks' own words at random")
SIZE = 16


def points_of_worked_example(folder: Path, seed: int) -> list[Point]:
    """Points of the held-out tasks: of their own prompts, and of the same with a share replaced.

    Args:
        folder: What the run has left, `.../seed-N`.
        seed: The run's seed.
    """
    world = build_world(seed)
    generator = PromptConditionedLoraGenerator.from_pretrained(folder / "generator")
    mean = mean_adapter(generator)
    base, tokenizer = load_base(folder / "base")
    words = sorted({word for task in world.training_tasks for line in world.prompts(task) for word in line.split()})
    strange = strange_prompts(SIZE, words, seed=seed)
    questions = {task.name: world.scored_examples(task) for task in world.held_out_tasks}
    of_base = {name: score(base, tokenizer, asked) for name, asked in questions.items()}
    points = []
    model = None
    for task in tqdm(world.held_out_tasks, desc=f"worked example, seed {seed}"):
        asked = questions[task.name]
        own = PeftModel.from_pretrained(load_base(folder / "base")[0], folder / "trained" / task.name)
        trained = score(own, tokenizer, asked)
        for kind, prompts in _prompt_sets(world.prompts(task)[:SIZE], strange, seed):
            adapter = generator.generate_adapter(prompts)
            model = adapter.load_into(base if model is None else model)
            found, threshold = score_of(generator, prompts)
            points.append(
                Point(
                    task=f"{task.name}, seed {seed}",
                    kind=kind,
                    score=found,
                    threshold=threshold,
                    agreement=agreement_of(generator.generate_adapter, prompts, mean),
                    base=of_base[task.name],
                    generated=score(model, tokenizer, asked),
                    trained=trained,
                )
            )
    return points


def _prompt_sets(prompts: list[str], strange: dict[str, list[str]], seed: int) -> list[tuple[str, list[str]]]:
    found = [("own prompts", prompts)]
    for kind in STRANGE:
        for share in SHARES:
            count = round(share * len(prompts))
            put = random.Random(f"{kind} {share} {seed}").sample(strange[kind], count)
            found.append((f"{kind}, {share:.0%}", [*prompts[count:], *put]))
    return found
