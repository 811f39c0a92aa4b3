# SPDX-License-Identifier: Apache-2.0
"""Tuning LoRA adapters with TRL, and collecting their checkpoints."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from recipe import Tuning
from rows import Example, messages
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_dnd import CheckpointCollector
from peft_dnd.generator import PaperSettings
from peft_dnd.pairs import use_common_initialization
from peft_dnd.storage.files import staged_directory


logger = logging.getLogger("recipes")


def reads_images(base: str) -> bool:
    """Whether a base model has a vision tower."""
    return hasattr(AutoConfig.from_pretrained(base), "vision_config")


def load_base(base: str, *, bf16: bool) -> nn.Module:
    """Load a base model, onto the GPU if there is one."""
    model_class = AutoModelForImageTextToText if reads_images(base) else AutoModelForCausalLM
    model: nn.Module = model_class.from_pretrained(base, dtype=torch.bfloat16 if bf16 else torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_processor(base: str) -> Any:
    """Load what turns conversations into a base model's input: its tokenizer, or with pictures its processor."""
    return (AutoProcessor if reads_images(base) else AutoTokenizer).from_pretrained(base)


class Tuner:
    """Tunes LoRAs on a base model, each from the base as it was.

    Args:
        base: The base model's Hub id or folder.
        settings: Says what the adapters are like.
        tuning: The schedule.
        seed: Of the adapters' start and the order of examples.
        work: A folder for what is only needed on the way.
    """

    def __init__(self, base: str, settings: PaperSettings, tuning: Tuning, seed: int, work: Path) -> None:
        self.base = base
        self.settings = settings
        self.tuning = tuning
        self.seed = seed
        self.work = work

    def collect(self, examples: Sequence[Example], folder: Path, checkpoints: int) -> None:
        """Tune a LoRA on a data set in the recipe's two parts, and keep checkpoints of the second.

        Args:
            examples: The data set's examples.
            folder: The task's folder in a pairs folder.
            checkpoints: How many of the last steps' checkpoints to keep.
        """
        model = self._fresh()
        # The first part starts all data sets' adapters from the same place; the second goes on from there.
        use_common_initialization(model, folder.parent)
        self._train(model, examples, self.tuning.steps, self.tuning.learning_rate, "cosine")
        collector = CheckpointCollector(
            folder,
            prompts=[example.prompt for example in examples],
            answers=[str(example.answer) for example in examples],
            last=min(checkpoints, self.tuning.last_steps),
            common_initialization=False,
        )
        last = self.tuning.last_learning_rate
        self._train(model, examples, self.tuning.last_steps, last, "constant", callbacks=[collector])

    def tune(
        self,
        examples: Sequence[Example],
        folder: Path,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Tune a LoRA and save it as a plain adapter.

        Args:
            examples: What it is tuned on.
            folder: Where it is saved.
            steps: Optimiser steps; by default those of both parts.
            batch_size: By default the recipe's.
            learning_rate: By default that of the first part.
        """
        model = self._fresh()
        self._train(
            model,
            examples,
            steps or self.tuning.steps + self.tuning.last_steps,
            learning_rate or self.tuning.learning_rate,
            "cosine",
            batch_size,
        )
        with staged_directory(folder) as staged:
            model.save_pretrained(staged)

    def _fresh(self) -> nn.Module:
        torch.manual_seed(self.seed)
        lora = self.settings.lora_config()
        lora.base_model_name_or_path = self.base
        # Adapters in float32, whatever the base is in.
        return get_peft_model(load_base(self.base, bf16=self.tuning.bf16), lora)

    def _train(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        steps: int,
        learning_rate: float,
        schedule: str,
        batch_size: int | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        batch_size = batch_size or self.tuning.batch_size
        at_once = min(self.tuning.per_device_batch_size, batch_size)
        output = self.work / "tuning"
        arguments = SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=math.ceil(batch_size / at_once),
            # Cut pictures' placeholders would no longer match the pictures.
            max_length=None if reads_images(self.base) else self.tuning.max_length,
            completion_only_loss=True,
            bf16=self.tuning.bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=torch.cuda.is_available(),
            seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not logger.isEnabledFor(logging.INFO),
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(examples),
            processing_class=load_processor(self.base),
            callbacks=list(callbacks),
        )
        trainer.train()
        shutil.rmtree(output, ignore_errors=True)


def _dataset(examples: Sequence[Example]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([messages(example) for example in examples])
