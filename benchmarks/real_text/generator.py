# SPDX-License-Identifier: Apache-2.0
"""Fitting the generators that are compared: ours, and the paper's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from base import EncodedTask, UpperLayers, similarity_loss
from tasks import Batch, make_batch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.adapters import weight_statistics
from peft_dnd.pairs import task_balanced_grids
from peft_dnd.text import SentenceTransformerTextEncoder


class RememberingTextEncoder(SentenceTransformerTextEncoder):
    """A text encoder that reads each prompt once, however many generators are fitted."""

    def encode_sentences(self, prompts: Sequence[str]) -> Tensor:
        """As the frozen text encoder does."""
        known: dict[str, Tensor] = self.__dict__.setdefault("_known", {})
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, super().encode_sentences(new), strict=True))
        return torch.stack([known[prompt] for prompt in prompts])


def fit_generator(
    pairs: PromptCheckpointDataset,
    settings: Mapping[str, Any],
    text_encoder: SentenceTransformerTextEncoder,
    folder: Path,
    seed: int,
    *,
    start: Mapping[str, Tensor] | None = None,
    base: UpperLayers | None = None,
    tasks: Mapping[str, EncodedTask] | None = None,
) -> PromptConditionedLoraGenerator:
    """Fit a generator.

    Args:
        pairs: The training tasks' pairs.
        settings: `"config"` for the generator's configuration, `"fitting"` for `DnDTrainingArguments`.
        text_encoder: Reads the prompts.
        folder: Where the trainer may write.
        seed: Seed of everything.
        start: The adapter that an unfitted generator writes; the mean of the training adapters by default.
        base: The base, for task loss.
        tasks: Its examples.
    """
    torch.manual_seed(seed)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, text_encoder, **settings["config"])
    generator = PromptConditionedLoraGenerator(config, text_encoder=text_encoder)
    if start is not None:
        tokenizer = generator.weight_tokenizer
        _, scale = weight_statistics(tokenizer, task_balanced_grids(pairs, tokenizer))
        generator.normalization.set_statistics(tokenizer.encode(start), scale)
    arguments = DnDTrainingArguments(
        output_dir=str(folder),
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings["fitting"],
    )
    trainer = DnDTrainer(
        generator,
        arguments,
        pairs,
        base_model=base,
        task_collator=None if tasks is None else _collator(tasks),
        task_loss_function=None if base is None else similarity_loss,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return generator


def _collator(tasks: Mapping[str, EncodedTask]) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    def collate(examples: Sequence[Mapping[str, Any]]) -> Batch:
        # All examples of an item are of one task.
        return make_batch(tasks[examples[0]["task"]], [example["row"] for example in examples])

    return collate
