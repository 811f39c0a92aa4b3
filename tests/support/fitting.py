# SPDX-License-Identifier: Apache-2.0
"""Fits that a test can wait for: their arguments, and a small generator of the paper's decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_dnd import (
    AdapterLayout,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


def fitting_arguments(folder: Path, **changes: Any) -> DnDTrainingArguments:
    """A few steps on the CPU, of which nothing is saved, reported or drawn."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return DnDTrainingArguments(output_dir=str(folder), **{**settings, **changes})


def convolution_generator(
    adapters: PromptCheckpointDataset | AdapterLayout, encoder_folder: Path, **changes: Any
) -> PromptConditionedLoraGenerator:
    """A generator with the paper's decoder, not yet fitted; the same at every call."""
    settings = {
        "num_prompts": 3,
        "decoder_type": "hyper_convolution",
        "decoder_config": {"kernel_size": 3},
        **changes,
    }
    config = PromptConditionedLoraGeneratorConfig.from_adapters(adapters, str(encoder_folder), **settings)
    torch.manual_seed(0)
    return PromptConditionedLoraGenerator(config)
