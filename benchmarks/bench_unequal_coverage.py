# SPDX-License-Identifier: Apache-2.0
"""Very unequal coverage, on world 1: what becomes of tasks with a hundredth of the others' checkpoints or prompts.

    python benchmarks/bench_unequal_coverage.py

Four of the 24 training tasks are rare. Either they have 1 checkpoint and the others a hundred (ten, each of which
counts ten times), and `task_sampling_exponent` says how often a task comes; or they have 1 prompt and the others a
hundred. Points are exact matches of the rare tasks, and of as many others, on their own questions, in wordings that
were never fitted on; an adapter is written from the task's whole pool of 64 prompts, rare or not. What has been
measured is kept in --output: a second run starts from there.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent
sys.path[:0] = [
    str(BENCHMARKS),
    str(BENCHMARKS / "worked_example"),
    str(BENCHMARKS.parent / "examples/worked_example"),
]

from bench_arrivals import Arrivals, make_the_pairs  # noqa: E402
from record import write_result  # noqa: E402
from run import FITTING_SETTINGS  # noqa: E402

from peft_dnd import PromptCheckpointDataset  # noqa: E402
from peft_dnd.pairs.folder import load_task  # noqa: E402
from peft_dnd.storage.files import read_json  # noqa: E402


RARE = 4
OTHERS_PROMPTS = 100
OTHERS_VISITS = 10
# What is measured: name -> (whether checkpoints are unequal, whether prompts are, the exponent).
CASES: dict[str, tuple[bool, bool, float]] = {
    "checkpoints 100 to 1, exponent 1": (True, False, 1.0),
    "checkpoints 100 to 1, exponent 0": (True, False, 0.0),
    "prompts 100 to 1": (False, True, 1.0),
    "checkpoints 100 to 1, exponent 0.5": (True, False, 0.5),
    "both 100 to 1, exponent 0": (True, True, 0.0),
}


class Coverage(Arrivals):
    """Fits generators on tasks of unequal size.

    Args:
        seed: The world's seed.
        output: The worked example's folder.
    """

    def __init__(self, seed: int, output: Path) -> None:
        super().__init__(seed, output)
        names = [task.name for task in self.world.training_tasks]
        self.rare = sorted(random.Random(f"rare {seed}").sample(names, RARE))
        others = [name for name in names if name not in self.rare]
        self.others = sorted(random.Random(f"others {seed}").sample(others, RARE))
        self._path = output / f"seed-{seed}" / "unequal_coverage.json"
        self.points: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}

    def unequal(self, checkpoints: bool, prompts: bool) -> PromptCheckpointDataset:
        """The training tasks' pairs, those of the rare ones cut down."""
        tasks = []
        for world_task in self.world.training_tasks:
            rare = world_task.name in self.rare
            task = load_task(self.bench.folder / "pairs" / world_task.name)
            if checkpoints:
                task = replace(task, checkpoints=task.checkpoints[-1:] if rare else task.checkpoints * OTHERS_VISITS)
            if prompts:
                pool = tuple(self.world.prompts(world_task, OTHERS_PROMPTS))
                task = replace(task, prompts=pool[:1] if rare else pool)
            tasks.append(task)
        return PromptCheckpointDataset(tasks, keep_in_memory=True)

    def measure(self, checkpoints: bool, prompts: bool, exponent: float) -> dict[str, Any]:
        """Fit and score one case."""
        pairs = self.unequal(checkpoints, prompts)
        generator, _ = self.fit_pairs(
            pairs, None, FITTING_SETTINGS["max_steps"], task_sampling_exponent=exponent, replay_store_share=0.0
        )
        scores = self.scores(generator, [*self.rare, *self.others])
        rare, others = ([scores[name] for name in part] for part in (self.rare, self.others))
        return {
            "mean of the rare": round(fmean(rare), 2),
            "worst of the rare": min(rare),
            "mean of the others": round(fmean(others), 2),
            "worst of the others": min(others),
            "scores": scores,
        }


def main() -> None:
    """Measure all cases and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="where all is kept; the worked example's too"
    )
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    make_the_pairs(options.seed, options.output)
    coverage = Coverage(options.seed, options.output)
    for name, case in list(CASES.items())[: options.cases]:
        coverage.point(name, lambda case=case: coverage.measure(*case))
        result = {"seed": options.seed, "rare": coverage.rare, "others": coverage.others, "cases": coverage.points}
        command = f"python benchmarks/bench_unequal_coverage.py --seed {options.seed} --cases {len(coverage.points)}"
        write_result("unequal_coverage", result, command)


if __name__ == "__main__":
    main()
