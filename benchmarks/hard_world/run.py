# SPDX-License-Identifier: Apache-2.0
"""The hard world: properties that interact, where no shortcut will do. One command from nothing to a record.

    python benchmarks/hard_world/run.py --seed 0 --output hard_world_output

1. Pretrain a small base model that knows facts about invented people but cannot read instructions.
2. Train a LoRA adapter for each training task and collect its last checkpoints.
3. Train what generated adapters are compared with: one LoRA on all training tasks, and one for each held-out task.
4. Fit a generator on the prompt-checkpoint pairs, and the paper's decoder on the same.
5. Judge both on the held-out tasks by the protocol of `peft_dnd.evaluation`.

What is finished is kept: a second run starts from there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from fitting import SETTINGS, fit_generator, train_on_all_tasks  # noqa: E402
from hard_base import PRETRAINING, make_base  # noqa: E402
from hard_world import World, build_world  # noqa: E402
from judging import judge  # noqa: E402
from record import write_result  # noqa: E402
from stages import Progress, Stage  # noqa: E402
from tasks import collect_pairs, train_ceilings  # noqa: E402


logger = logging.getLogger("hard_world")

# The models are tiny: a second thread gains little, and costs much where the cores are shared.
torch.set_num_threads(1)

ADAPTERS: dict[str, Any] = {"rank": 4, "alpha": 8, "steps": 40, "batch_size": 16, "learning_rate": 5e-3}
CHECKPOINTS = 10
# One LoRA has to learn much more from all tasks than from one.
MULTI_TASK: dict[str, Any] = {**ADAPTERS, "steps": 2000, "batch_size": 32}

# What a run's products depend on, besides the seed.
ALL_SETTINGS: dict[str, Any] = {
    "base": PRETRAINING,
    "adapters": {**ADAPTERS, "checkpoints": CHECKPOINTS},
    "multi_task": MULTI_TASK,
    "generators": SETTINGS,
}

STAGES = {
    "base": Stage(
        "pretraining the base",
        ("base",),
        ("pairs", "trained", "multi_task", "generator", "paper", "paper_small", "evaluation"),
    ),
    "pairs": Stage(
        "training adapters and collecting checkpoints", ("pairs",), ("generator", "paper", "paper_small", "evaluation")
    ),
    "trained": Stage("training on the held-out tasks", ("trained",), ("evaluation",)),
    "multi_task": Stage("training one LoRA on all training tasks", ("multi_task",), ("evaluation",)),
    "generator": Stage("fitting the generator", ("generator-fitting", "generator"), ("evaluation",)),
    "paper": Stage("fitting the paper's decoder", ("paper-fitting", "paper"), ("evaluation",)),
    "paper_small": Stage(
        "fitting the paper's decoder, small", ("paper_small-fitting", "paper_small"), ("evaluation",)
    ),
    "evaluation": Stage("judging", ("evaluation",)),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed: other people, facts and tasks")
    parser.add_argument("--output", type=Path, default=Path("hard_world_output"), help="where everything goes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()

    progress = Progress(options.output / f"seed-{options.seed}", STAGES)
    progress.check_settings(ALL_SETTINGS)
    world = build_world(options.seed)

    make_the_base(world, progress)
    pairs = collect_pairs(world, progress, ALL_SETTINGS["adapters"])
    train_ceilings(world, progress, ADAPTERS)
    train_on_all_tasks(world, progress, MULTI_TASK)
    generators = {
        name: fit_generator(name, settings, pairs, progress, world.seed) for name, settings in SETTINGS.items()
    }

    with progress.working_on("evaluation"):
        report = judge(world, progress.folder, pairs, generators, dict(progress.seconds))
        report.save(progress.folder / "evaluation")
    command = f"python benchmarks/hard_world/run.py --seed {options.seed}"
    result = {"seed": options.seed, **report.to_dict(include_scores=False)}
    result |= {"seconds": progress.seconds, "settings_of": ALL_SETTINGS}
    result |= {"parameters": {name: generator.num_parameters() for name, generator in generators.items()}}
    write_result(f"hard_world_seed_{options.seed}", result, command)


def make_the_base(world: World, progress: Progress) -> None:
    """Pretrain the base model, unless it is there."""
    folder = progress.folder / "base"
    if not (folder / "config.json").is_file():
        logger.info("1. Pretraining a small base model on what is true of %d people", len(world.people))
        with progress.working_on("base"):
            make_base(world, folder)


if __name__ == "__main__":
    main()
