# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Curves on the hard world: how held-out accuracy depends on what a generator is fitted on and given.

    python benchmarks/hard_world/run.py --seed 0 --output hard_world_output
    python benchmarks/hard_world/curves.py --seed 0 --output hard_world_output

Works with the pairs and held-out tasks that the first command made. What has been measured is kept: a second run
starts from there.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from run import STAGES, collect_pairs, is_complete  # first: it makes the other modules importable


from base import load_base  # isort: skip
from fitting import SETTINGS, fit
from hard_world import LANGUAGES, TYPOS, Task, World, build_world
from record import write_result
from stages import Progress
from tasks import answers_exactly
from torch import nn

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.evaluation import PROTOCOL_ROWS, HeldOutTask, evaluate_generator
from peft_dnd.files import read_json, write_json
from peft_dnd.pairs import load_task


# Fewer steps than the benchmark itself: curves compare, and there are many fits.
STEPS = 500
TASK_COUNTS = (2, 4, 8, 16, 32, None)
CHECKPOINT_COUNTS = (1, 3, 10)
PROMPT_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Curves:
    """Measures points and keeps them in a file.

    Args:
        world: The world.
        folder: What `run.py` made.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.path = folder / "curves.json"
        self.points: dict[str, dict[str, Any]] = read_json(self.path) if self.path.is_file() else {}

    def point(self, curve: str, at: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a point of a curve, unless it has been."""
        if at not in self.points.setdefault(curve, {}):
            began = time.perf_counter()
            self.points[curve][at] = {**measure(), "seconds": round(time.perf_counter() - began, 1)}
            write_json(self.path, self.points)

    def fit(
        self, name: str, pairs: PromptCheckpointDataset, start: PromptConditionedLoraGenerator | None = None
    ) -> PromptConditionedLoraGenerator:
        """Fit the benchmark's generator on pairs, anew or going on from another, unless it is there."""
        target = self.folder / "curves" / name
        if not (target / "config.json").is_file():
            settings = copy.deepcopy(SETTINGS["generator"])
            settings["fitting"]["max_steps"] = STEPS
            output = self.folder / "curves" / f"{name}-fitting"
            fit(settings, pairs, self.folder / "base", output, self.world.seed, start).save_pretrained(target)
        return PromptConditionedLoraGenerator.from_pretrained(target)

    def score(
        self,
        generator: PromptConditionedLoraGenerator,
        prompts: Callable[[Task], Sequence[str]] | None = None,
        tasks: Sequence[Task] | None = None,
    ) -> dict[str, Any]:
        """Exact match of adapters generated for tasks, by default the held-out ones from their own prompts."""
        chosen = {task.name: task for task in (self.world.held_out_tasks if tasks is None else tasks)}
        base, tokenizer = load_base(self.folder / "base")
        questions = {name: self.world.scored_examples(task) for name, task in chosen.items()}

        def scorer(model: nn.Module, task: str) -> list[float]:
            return [float(right) for right in answers_exactly(model, tokenizer, questions[task])]

        report = evaluate_generator(
            generator,
            base,
            None,
            {name: HeldOutTask((prompts or self.world.prompts)(task)) for name, task in chosen.items()},
            scorer,
            skip=set(PROTOCOL_ROWS) - {"generated"},
            seed=self.world.seed,
        )
        return report.rows["generated"].mean.to_dict()


def main() -> None:
    """Measure all curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the seed that run.py was given")
    parser.add_argument("--output", type=Path, default=Path("hard_world_output"), help="where run.py's output is")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    folder = options.output / f"seed-{options.seed}"
    world = build_world(options.seed)
    if not all(is_complete(folder / "pairs" / task.name) for task in world.training_tasks):
        raise SystemExit(f"{folder} is not finished. Run benchmarks/hard_world/run.py --seed {options.seed} first.")
    pairs = collect_pairs(world, folder, Progress(folder, STAGES))
    curves = Curves(world, folder)

    fitted = PromptConditionedLoraGenerator.from_pretrained(folder / "generator")
    by_prompts(curves, fitted)
    by_sort(curves, fitted)
    by_tasks(curves, pairs)
    by_checkpoints(curves, pairs)
    unbalanced(curves, pairs)
    new_tasks(curves, pairs)
    write_result(
        f"hard_world_curves_seed_{options.seed}",
        {"seed": options.seed, "steps": STEPS, "curves": curves.points},
        f"python benchmarks/hard_world/curves.py --seed {options.seed}",
    )


def by_prompts(curves: Curves, generator: PromptConditionedLoraGenerator) -> None:
    """Prompts to generate from, with the benchmark's own generator."""
    for count in PROMPT_COUNTS:
        curves.point(
            "prompts to generate from",
            str(count),
            lambda count=count: curves.score(generator, lambda task: _some_prompts(curves.world, task, count)),
        )


def by_sort(curves: Curves, generator: PromptConditionedLoraGenerator) -> None:
    """Sets of one sort of prompt alone, with the benchmark's own generator."""
    for sort in ("english", TYPOS, *LANGUAGES):
        curves.point(
            "prompts of one sort alone",
            sort,
            lambda sort=sort: curves.score(generator, lambda task: curves.world.prompts(task, sort)),
        )


def by_tasks(curves: Curves, pairs: PromptCheckpointDataset) -> None:
    """Training tasks. Smaller sets are parts of larger ones."""
    order = random.Random(curves.world.seed).sample(pairs.tasks, len(pairs.tasks))
    for count in TASK_COUNTS:
        some = PromptCheckpointDataset.from_folder(curves.folder / "pairs", tasks=order[:count])
        name = f"tasks-{len(some.tasks)}"
        curves.point(
            "training tasks",
            str(len(some.tasks)),
            lambda some=some, name=name: curves.score(curves.fit(name, some)),
        )


def by_checkpoints(curves: Curves, pairs: PromptCheckpointDataset) -> None:
    """Checkpoints of each training task, the last ones."""
    for count in CHECKPOINT_COUNTS:
        some = _with_checkpoints(curves.folder, dict.fromkeys(pairs.tasks, count))
        curves.point(
            "checkpoints a task",
            str(count),
            lambda some=some, count=count: curves.score(curves.fit(f"checkpoints-{count}", some)),
        )


def unbalanced(curves: Curves, pairs: PromptCheckpointDataset) -> None:
    """A quarter of the tasks with ten checkpoints each, the others with one; each one is drawn equally often."""
    many = set(random.Random(curves.world.seed).sample(pairs.tasks, len(pairs.tasks) // 4))
    counts = {task: 10 if task in many else 1 for task in pairs.tasks}
    some = _with_checkpoints(curves.folder, counts)
    curves.point("unbalanced tasks", "10 or 1", lambda: curves.score(curves.fit("unbalanced", some)))


def new_tasks(curves: Curves, pairs: PromptCheckpointDataset) -> None:
    """Tasks of one kind of thing come later: continued fitting on them alone, and on all, against fitting anew."""
    world = curves.world
    kind = world.training_tasks[-1].kind
    old, new = ([t for t in world.training_tasks if (t.kind == kind) == late] for late in (False, True))
    old_pairs, new_pairs = (
        PromptCheckpointDataset.from_folder(curves.folder / "pairs", tasks=[t.name for t in part])
        for part in (old, new)
    )

    def both(generator: PromptConditionedLoraGenerator) -> dict[str, Any]:
        return {
            "old tasks": curves.score(generator, tasks=old[::10]),
            "new tasks": curves.score(generator, tasks=new[::2]),
            "held-out tasks": curves.score(generator),
        }

    def continued(name: str, part: PromptCheckpointDataset) -> PromptConditionedLoraGenerator:
        return curves.fit(name, part, start=curves.fit("old", old_pairs))

    ways: dict[str, Callable[[], PromptConditionedLoraGenerator]] = {
        "fitted on the old ones": lambda: curves.fit("old", old_pairs),
        "continued on the new ones": lambda: continued("continued-new", new_pairs),
        "continued on all": lambda: continued("continued-all", pairs),
        "fitted anew on all": lambda: curves.fit(f"tasks-{len(pairs.tasks)}", pairs),
    }
    for way, generator in ways.items():
        curves.point("new tasks", way, lambda generator=generator: both(generator()))


def _some_prompts(world: World, task: Task, count: int) -> list[str]:
    pool = world.prompts(task, count=max(PROMPT_COUNTS))
    return random.Random(f"{world.seed} {task.name}").sample(pool, count)


def _with_checkpoints(folder: Path, counts: dict[str, int]) -> PromptCheckpointDataset:
    tasks = [load_task(folder / "pairs" / name) for name in counts]
    return PromptCheckpointDataset(
        [replace(task, checkpoints=task.checkpoints[-counts[task.name] :]) for task in tasks], keep_in_memory=True
    )
