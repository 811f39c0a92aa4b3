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
import time
from pathlib import Path
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import load_base, tokenize_example  # noqa: E402
from fitting import SETTINGS, fit  # noqa: E402
from hard_base import PRETRAINING, make_base  # noqa: E402
from hard_world import World, build_world  # noqa: E402
from judging import judge  # noqa: E402
from record import write_result  # noqa: E402
from stages import Progress, Stage  # noqa: E402
from tasks import train_adapter  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from peft_dnd import (  # noqa: E402
    CheckpointCollector,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.storage.files import read_json, staged_directory, write_json  # noqa: E402


logger = logging.getLogger("hard_world")

# The models are tiny: a second thread gains little, and costs much where the cores are shared.
torch.set_num_threads(1)

ADAPTERS: dict[str, Any] = {"rank": 4, "alpha": 8, "steps": 40, "batch_size": 16, "learning_rate": 5e-3}
CHECKPOINTS = 10
# One LoRA has to learn much more from all tasks than from one.
MULTI_TASK: dict[str, Any] = {**ADAPTERS, "steps": 2000, "batch_size": 32}

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

    folder = options.output / f"seed-{options.seed}"
    check_settings(folder)
    world = build_world(options.seed)
    progress = Progress(folder, STAGES)

    make_the_base(world, folder, progress)
    pairs = collect_pairs(world, folder, progress)
    train_ceilings(world, folder, progress)
    train_on_all_tasks(world, folder, progress)
    generators = {name: fit_generator(name, pairs, world, folder, progress) for name in SETTINGS}

    progress.begin("evaluation")
    began = time.perf_counter()
    report = judge(world, folder, pairs, generators, dict(progress.seconds))
    progress.spent("evaluation", time.perf_counter() - began)
    report.save(folder / "evaluation")
    command = f"python benchmarks/hard_world/run.py --seed {options.seed}"
    result = {"seed": options.seed, **report.to_dict(include_scores=False)}
    result |= {"seconds": progress.seconds, "settings_of": all_settings()}
    result |= {"parameters": {name: count_parameters(generator) for name, generator in generators.items()}}
    write_result(f"hard_world_seed_{options.seed}", result, command)


def all_settings() -> dict[str, Any]:
    """What a run's products depend on, besides the seed."""
    return {
        "base": PRETRAINING,
        "adapters": {**ADAPTERS, "checkpoints": CHECKPOINTS},
        "multi_task": MULTI_TASK,
        "generators": SETTINGS,
    }


def check_settings(folder: Path) -> None:
    """Make sure that what an earlier run left was made with these settings."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, all_settings())
    elif read_json(path) != all_settings():
        raise SystemExit(f"{folder} was made with other settings than there are now. Remove it: rm -r {folder}")


def make_the_base(world: World, folder: Path, progress: Progress) -> None:
    """Pretrain the base model, unless it is there."""
    if (folder / "base" / "config.json").is_file():
        return
    logger.info("1. Pretraining a small base model on what is true of %d people", len(world.people))
    progress.begin("base")
    began = time.perf_counter()
    make_base(world, folder / "base")
    progress.spent("base", time.perf_counter() - began)


def collect_pairs(world: World, folder: Path, progress: Progress) -> PromptCheckpointDataset:
    """Train an adapter for each training task and collect its last checkpoints, where that is not done yet."""
    missing = [task for task in world.training_tasks if not is_complete(folder / "pairs" / task.name)]
    if missing:
        logger.info("2. Training adapters for %d tasks, and collecting checkpoints", len(missing))
        progress.begin("pairs")
        tokenizer = load_base(folder / "base")[1]
    for task in tqdm(missing, desc="training tasks"):
        began = time.perf_counter()
        examples = world.training_examples(task)
        collector = CheckpointCollector(
            folder / "pairs" / task.name,
            prompts=world.prompts(task),
            last=CHECKPOINTS,
            examples=[tokenize_example(tokenizer, example) for example in examples],
        )
        train_adapter(folder / "base", examples, world.seed, [collector], ADAPTERS)
        progress.spent("pairs", time.perf_counter() - began)
    return PromptCheckpointDataset.from_folder(folder / "pairs", tasks=[task.name for task in world.training_tasks])


def is_complete(task_folder: Path) -> bool:
    """Whether a task's checkpoints have all been collected."""
    record = task_folder / "task.json"
    return record.is_file() and read_json(record)["complete"]


def train_ceilings(world: World, folder: Path, progress: Progress) -> None:
    """Train an adapter for each held-out task, to compare with. The generator never sees these."""
    missing = [task for task in world.held_out_tasks if not (folder / "trained" / task.name).is_dir()]
    if missing:
        logger.info("3. Training adapters on %d held-out tasks, only to compare with", len(missing))
        progress.begin("trained")
    for task in tqdm(missing, desc="held-out tasks"):
        began = time.perf_counter()
        model = train_adapter(folder / "base", world.training_examples(task), world.seed, settings=ADAPTERS)
        with staged_directory(folder / "trained" / task.name) as staged:
            model.save_pretrained(staged)
        progress.spent("trained", time.perf_counter() - began)


def train_on_all_tasks(world: World, folder: Path, progress: Progress) -> None:
    """Train one LoRA on the examples of all training tasks, which has to read the prompt, unless it is there."""
    if (folder / "multi_task").is_dir():
        return
    logger.info("   Training one LoRA on all training tasks together, only to compare with")
    progress.begin("multi_task")
    began = time.perf_counter()
    examples = [example for task in world.training_tasks for example in world.training_examples(task)]
    model = train_adapter(folder / "base", examples, world.seed, settings=MULTI_TASK)
    with staged_directory(folder / "multi_task") as staged:
        model.save_pretrained(staged)
    progress.spent("multi_task", time.perf_counter() - began)


def fit_generator(
    name: str, pairs: PromptCheckpointDataset, world: World, folder: Path, progress: Progress
) -> PromptConditionedLoraGenerator:
    """Fit one of the generators on the pairs, unless it is there."""
    if not (folder / name / "config.json").is_file():
        logger.info("4. Fitting on %d prompt-checkpoint pairs: %s", len(pairs), name)
        progress.begin(name)
        began = time.perf_counter()
        generator = fit(SETTINGS[name], pairs, folder / "base", folder / f"{name}-fitting", world.seed)
        generator.save_pretrained(folder / name)
        progress.spent(name, time.perf_counter() - began)
    return PromptConditionedLoraGenerator.from_pretrained(folder / name)


def count_parameters(generator: PromptConditionedLoraGenerator) -> int:
    """Parameters that were fitted."""
    return sum(parameter.numel() for parameter in generator.parameters())


if __name__ == "__main__":
    main()
