# SPDX-License-Identifier: Apache-2.0
"""Curves on world 1: how accuracy depends on training tasks, prompts, checkpoints, typing errors and balance.

    python benchmarks/worked_example/run.py --seed 0
    python benchmarks/worked_example/curves.py --seed 0

Works with the pairs that the first command made, and the settings of the example's generator. Each point is the exact
match on the held-out tasks, the mean over their questions. What has been measured is kept in --output: a second run
starts from there.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from example_generators import exact_matches, finished_example, fit, generating, new_generator  # noqa: E402
from record import write_result  # noqa: E402
from run import FITTING_SETTINGS  # noqa: E402
from world import Task, World, build_world  # noqa: E402

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator  # noqa: E402
from peft_dnd.pairs.folder import load_task  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402


TASK_COUNTS = (2, 4, 8, 12, 16, 20, 24)
PROMPT_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHECKPOINT_COUNTS = (1, 3, 10)
TEMPLATE_COUNTS = (4, 8, 16, 32, 64)
TYPO_RATES = (0.02, 0.05, 0.1, 0.2)


class Bench:
    """Fits generators on parts of a world's pairs, scores them, and keeps the points.

    Args:
        world: The world.
        folder: What the worked example made for its seed.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.path = folder / "curves.json"
        self.points: dict[str, dict[str, Any]] = read_json(self.path) if self.path.is_file() else {}

    def point(self, curve: str, at: object, measure: Callable[[], dict[str, float]]) -> None:
        """Measure one point of a curve, unless it has been."""
        if str(at) not in self.points.setdefault(curve, {}):
            self.points[curve][str(at)] = {name: round(value, 4) for name, value in measure().items()}
            write_json(self.path, self.points)

    def pairs(self, counts: dict[str, int]) -> PromptCheckpointDataset:
        """The last checkpoints of training tasks: name -> how many."""
        tasks = [load_task(self.folder / "pairs" / name) for name in counts]
        return PromptCheckpointDataset(
            [replace(task, checkpoints=task.checkpoints[-counts[task.name] :]) for task in tasks], keep_in_memory=True
        )

    def fit(
        self,
        counts: dict[str, int],
        start: PromptConditionedLoraGenerator | None = None,
        steps: int = FITTING_SETTINGS["max_steps"],
        **decoder_settings: int,
    ) -> tuple[PromptConditionedLoraGenerator, float]:
        """Fit a generator, anew or from another one, and the seconds of processor that it took."""
        pairs = self.pairs(counts)
        generator = start or new_generator(pairs, self.world.seed, **decoder_settings)
        # These curves show what comes without replay; bench_arrivals.py has the rest.
        settings = {"max_steps": steps, "replay_share": 0.0}
        return generator, fit(generator, pairs, self.folder / "curves-fitting", self.world.seed, **settings)

    def training_error(self, generator: PromptConditionedLoraGenerator) -> float:
        """Mean squared error of normalised tokens on the training tasks; the mean adapter has about 1."""
        pairs = self.pairs(dict.fromkeys(self.all_tasks(), 1))
        valid = generator.weight_tokenizer.valid_mask()
        errors = []
        for name in pairs.tasks:
            adapter = generator.generate_adapter(pairs.prompts(name), seed=self.world.seed)
            difference = [
                generator.normalization.normalize(generator.weight_tokenizer.encode(state))
                for state in (adapter.state_dict(), pairs.state_dict(name))
            ]
            errors.append((difference[0] - difference[1])[valid].square().mean().item())
        return fmean(errors)

    def all_tasks(self) -> dict[str, int]:
        """Every training task with its ten checkpoints."""
        return {task.name: 10 for task in self.world.training_tasks}

    def score(
        self,
        generator: PromptConditionedLoraGenerator,
        tasks: Sequence[Task] | None = None,
        prompts: Callable[[Task], Sequence[str]] | None = None,
    ) -> float:
        """Mean exact match of adapters generated from prompts of tasks, by default all those of the held-out ones."""
        chosen = self.world.held_out_tasks if tasks is None else tasks
        adapter_for = generating(generator, self.world, prompts)
        return fmean(exact_matches(self.folder / "base", self.world, chosen, adapter_for).values())


def main() -> None:
    """Measure all curves and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = finished_example(options.output, options.seed)
    bench = Bench(build_world(options.seed), folder)
    by_prompts(bench, PromptConditionedLoraGenerator.from_pretrained(folder / "generator"))
    by_templates(bench)
    by_pairs(bench)
    new_tasks(bench)
    command = f"python benchmarks/worked_example/curves.py --seed {options.seed}"
    write_result(f"world_1_curves_seed_{options.seed}", {"seed": options.seed, "curves": bench.points}, command)


def by_prompts(bench: Bench, generator: PromptConditionedLoraGenerator) -> None:
    """How many prompts the example's generator is given, and how badly they are typed."""
    prompts = bench.world.prompts
    for count in PROMPT_COUNTS:

        def some(task: Task, count: int = count) -> Sequence[str]:
            return prompts(task, count)

        bench.point("prompts", count, lambda some=some: {"held out": bench.score(generator, None, some)})
    for rate in TYPO_RATES:

        def mistyped(task: Task, rate: float = rate) -> Sequence[str]:
            return _mistype(prompts(task), rate)

        bench.point(
            "share of letters mistyped", rate, lambda some=mistyped: {"held out": bench.score(generator, None, some)}
        )


def by_templates(bench: Bench) -> None:
    """How many templates the decoder has, with its error on the training adapters (the mean adapter has 1)."""
    for count in TEMPLATE_COUNTS:

        def measure(count: int = count) -> dict[str, float]:
            generator, _ = bench.fit(bench.all_tasks(), num_templates=count)
            return {"held out": bench.score(generator), "training error": bench.training_error(generator)}

        bench.point("templates", count, measure)


def by_pairs(bench: Bench) -> None:
    """How many training tasks there are, how many checkpoints of each, and whether they are balanced."""
    names = [task.name for task in bench.world.training_tasks]
    order = random.Random(bench.world.seed).sample(names, len(names))
    shares = {
        "training tasks": {count: dict.fromkeys(order[:count], 10) for count in TASK_COUNTS},
        "checkpoints a task": {count: dict.fromkeys(names, count) for count in CHECKPOINT_COUNTS},
        "checkpoints of a quarter of the tasks and of the others": {
            "10 and 1": {name: 10 if name in order[: len(order) // 4] else 1 for name in names}
        },
    }
    for curve, points in shares.items():
        for at, counts in points.items():

            def measure(counts: dict[str, int] = counts) -> dict[str, float]:
                generator, seconds = bench.fit(counts)
                return {"held out": bench.score(generator), "seconds of fitting": seconds}

            bench.point(curve, at, measure)


def new_tasks(bench: Bench) -> None:
    """A quarter of the tasks comes later: fitting goes on with them alone, or with all, or begins anew with all."""
    tasks = bench.world.training_tasks
    late = random.Random(bench.world.seed).sample(tasks, len(tasks) // 4)
    early = [task for task in tasks if task not in late]
    later, before, everything = ({task.name: 10 for task in part} for part in (late, early, tasks))
    steps = FITTING_SETTINGS["max_steps"] // 3

    def scores(generator: PromptConditionedLoraGenerator, seconds: float) -> dict[str, float]:
        parts = {"early tasks": bench.score(generator, early), "late tasks": bench.score(generator, late)}
        return {**parts, "held out": bench.score(generator), "seconds of fitting": seconds}

    ways: dict[str, Callable[[], tuple[PromptConditionedLoraGenerator, float]]] = {
        "fitted on the early tasks": lambda: bench.fit(before),
        "then on the late tasks alone, a third of the steps": lambda: bench.fit(later, bench.fit(before)[0], steps),
        "then on all tasks, a third of the steps": lambda: bench.fit(everything, bench.fit(before)[0], steps),
        "fitted anew on all tasks": lambda: bench.fit(everything),
    }
    for name, way in ways.items():
        bench.point("new tasks", name, lambda way=way: scores(*way()))


def _mistype(prompts: Sequence[str], rate: float) -> list[str]:
    """Replaces a share of the letters by others."""
    chance = random.Random(f"typos {rate}")
    return [
        "".join(
            chance.choice("abcdefghijklmnopqrstuvwxyz") if letter.isalpha() and chance.random() < rate else letter
            for letter in prompt
        )
        for prompt in prompts
    ]


if __name__ == "__main__":
    main()
