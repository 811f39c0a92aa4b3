# SPDX-License-Identifier: Apache-2.0
"""The tasks of the worked example: training their adapters, collecting checkpoints, asking a model their questions."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from base import as_question, collate_examples, load_base, tokenize_example
from peft import LoraConfig, PeftConfig, get_peft_model
from stages import Progress
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from world import Example, World

from peft_dnd import CheckpointCollector, PromptCheckpointDataset
from peft_dnd.pairs import uncollected
from peft_dnd.storage.files import staged_directory


logger = logging.getLogger("worked_example")

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 16,
    "steps": 80,
    "checkpoints": 10,
    "batch_size": 32,
    "learning_rate": 3e-3,
}
_LONGEST_ANSWER = 8


def train_adapter(
    base_folder: Path,
    examples: Sequence[Example],
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    settings: Mapping[str, Any] = SETTINGS,
    config: PeftConfig | None = None,
) -> nn.Module:
    """Train an adapter on a task's examples, with plain PEFT and transformers.

    Args:
        base_folder: The base model's folder.
        examples: The task's examples.
        seed: Seed of the adapter's start and of the order of the examples.
        callbacks: More callbacks, a `CheckpointCollector` for one.
        settings: `rank`, `alpha`, `steps`, `batch_size` and `learning_rate`.
        config: The adapter's configuration, of any method; by default LoRA on all linear layers, of that rank and
            alpha.

    Returns:
        The trained `PeftModel`.
    """
    base, tokenizer = load_base(base_folder)
    torch.manual_seed(seed)
    if config is None:
        config = LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    model = get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[tokenize_example(tokenizer, example) for example in examples],
            data_collator=partial(collate_examples, pad_token_id=tokenizer.pad_token_id),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def train_and_save(
    target: Path, base_folder: Path, examples: Sequence[Example], seed: int, settings: Mapping[str, Any] = SETTINGS
) -> None:
    """Train a LoRA adapter as [`train_adapter`] does, and save it into a folder, whole or not at all."""
    model = train_adapter(base_folder, examples, seed, settings=settings)
    with staged_directory(target) as staged:
        model.save_pretrained(staged)


def collect_pairs(world: World, progress: Progress, settings: Mapping[str, Any] = SETTINGS) -> PromptCheckpointDataset:
    """Train an adapter for each training task and collect its last checkpoints, where that is not done yet."""
    tasks = {task.name: task for task in world.training_tasks}
    folder = progress.folder / "pairs"
    missing = uncollected(tasks, folder)
    if missing:
        logger.info("2. Training an adapter for each of %d tasks, and collecting checkpoints", len(missing))
    for name in tqdm(missing, desc="training tasks", disable=not missing):
        with progress.working_on("pairs"):
            collector = CheckpointCollector(
                folder / name, prompts=world.prompts(tasks[name]), last=settings["checkpoints"]
            )
            examples = world.training_examples(tasks[name])
            train_adapter(progress.folder / "base", examples, world.seed, [collector], settings)
    return PromptCheckpointDataset.from_folder(folder, tasks=list(tasks))


def train_ceilings(world: World, progress: Progress, settings: Mapping[str, Any] = SETTINGS) -> None:
    """Train an adapter for each held-out task, to compare with. The generator never sees these."""
    folder = progress.folder / "trained"
    missing = [task for task in world.held_out_tasks if not (folder / task.name).is_dir()]
    if missing:
        logger.info("3. Training adapters on %d held-out tasks, only to compare with", len(missing))
    for task in tqdm(missing, desc="held-out tasks", disable=not missing):
        with progress.working_on("trained"):
            examples = world.training_examples(task)
            train_and_save(folder / task.name, progress.folder / "base", examples, world.seed, settings)


def score(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """The share of questions that a model answers exactly, letter by letter, decoding greedily."""
    return fmean(answers_exactly(model, tokenizer, examples))


@torch.no_grad()
def answers_exactly(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[bool]:
    """For each question whether a model answers it exactly, letter by letter, decoding greedily."""
    model.eval()
    questions = [as_question(example.prompt) for example in examples]
    inputs = tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
    answers = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer == example.answer for answer, example in zip(answers, examples, strict=True)]
