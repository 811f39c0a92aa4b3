# SPDX-License-Identifier: Apache-2.0
"""Training LoRA adapters on one task or on many, with plain PEFT and transformers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from base import FIRST_ADAPTED_LAYER, EncodedTask, UpperLayers, load_base, similarity_loss
from data import TextTask
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from peft_dnd import CheckpointCollector
from peft_dnd.pairs import use_common_initialization


LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["query", "key", "value", "dense"],
    "layers_to_transform": list(range(FIRST_ADAPTED_LAYER, 6)),
}
BATCH_SIZE = 32
OWN: dict[str, Any] = {"steps": 60, "learning_rate": 3e-3, "checkpoints": 3, "prompts": 128}
# A task of more labels than this is trained on those of the batch alone.
_MOST_LABELS = 24

Batch = dict[str, Any]


def make_batch(task: EncodedTask, rows: Sequence[int]) -> Batch:
    """A batch of a task's training rows with its label names, for `base.similarity_loss`."""
    chosen = [task.train[row] for row in rows]
    kept = sorted({label for _, label in chosen}) if len(task.labels) > _MOST_LABELS else range(len(task.labels))
    place = {label: i for i, label in enumerate(kept)}
    return {
        "texts": [text for text, _ in chosen],
        "labels": [task.labels[label] for label in kept],
        "target": torch.tensor([place[label] for _, label in chosen]),
    }


def draw_batches(task: EncodedTask, count: int, seed: int) -> list[Batch]:
    """Batches of training rows in random order."""
    draw = random.Random(f"{seed} {task.name}")
    rows: list[int] = []
    while len(rows) < count * BATCH_SIZE:
        rows += draw.sample(range(len(task.train)), len(task.train))
    return [make_batch(task, rows[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]) for i in range(count)]


def mix_batches(tasks: Sequence[EncodedTask], count: int, seed: int) -> list[Batch]:
    """Batches of several tasks, each of one task, all tasks equally often, in random order."""
    each = -(-count // len(tasks))
    by_task = [draw_batches(task, each, seed) for task in tasks]
    draw = random.Random(seed)
    mixed: list[Batch] = []
    for turn in zip(*by_task, strict=True):
        mixed += draw.sample(turn, len(turn))
    return mixed[:count]


class SimilarityTrainer(Trainer):
    """Trains an encoder on batches that are made already, in their order."""

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The cross-entropy over the label names."""
        loss = similarity_loss(model, inputs)
        return (loss, {}) if return_outputs else loss


def train_lora(
    base: UpperLayers,
    batches: list[Batch],
    learning_rate: float,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    pairs: Path | None = None,
) -> nn.Module:
    """Train a LoRA adapter of the base, one step a batch.

    Args:
        base: The base, which gets the adapter.
        batches: The batches.
        learning_rate: Where it starts; it falls to zero by a cosine.
        seed: Seed of the adapter's first weights.
        callbacks: More callbacks, a `CheckpointCollector` for one.
        pairs: The pairs folder whose common initialisation the adapter starts from.

    Returns:
        The `PeftModel`.
    """
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**LORA))
    if pairs is not None:
        use_common_initialization(model, pairs)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=len(batches),
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SimilarityTrainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=lambda items: items[0],
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def collect(task: TextTask, encoded: EncodedTask, folder: Path, seed: int) -> None:
    """Train a task's own adapter, and keep its last checkpoints, its prompts and where its examples are.

    Args:
        task: The task.
        encoded: The same as states of the lower layers.
        folder: The task's folder inside the pairs folder.
        seed: Seed of the order of the examples.
    """
    texts = random.Random(f"prompts {seed} {task.name}").sample([text for text, _ in task.train], OWN["prompts"])
    # As one would ask a model that reads instructions. The base is shown the text alone.
    prompts = [f"{task.instruction} {text}" for text in texts]
    collector = CheckpointCollector(
        folder, prompts=prompts, last=OWN["checkpoints"], every=5, examples=[*_examples(task)]
    )
    train_lora(load_base(), draw_batches(encoded, OWN["steps"], seed), OWN["learning_rate"], seed, [collector])


def _examples(task: TextTask) -> Iterator[Mapping[str, Any]]:
    # The states are in memory; an example says which it is.
    return ({"task": task.name, "row": row} for row in range(len(task.train)))
