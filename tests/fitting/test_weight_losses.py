# SPDX-License-Identifier: Apache-2.0
"""Fits on the updates ΔW, and to canonical factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fitting import convolution_generator, fitting_arguments

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.adapters.factors import canonical_state_dict, delta_weight_mse
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.fitting.losses import masked_mse


def fit(
    folder: Path, pairs: PromptCheckpointDataset, encoder_folder: Path, **changes: Any
) -> tuple[DnDTrainer, PromptConditionedLoraGenerator]:
    generator = convolution_generator(pairs, encoder_folder, max_prompt_length=12)
    arguments = fitting_arguments(folder, **{"max_steps": 60, "logging_steps": 60, **changes})
    trainer = DnDTrainer(generator, arguments, pairs, pairs)
    trainer.train()
    return trainer, generator


def test_fitting_to_updates(pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path) -> None:
    trainer, generator = fit(tmp_path, pairs, encoder_folder, weight_loss="delta_weights")
    metrics = trainer.evaluate()
    # By what the modules are divided by, the mean adapter's loss over the training pairs is 1.
    assert metrics["eval_mean_adapter_loss"] == pytest.approx(1.0, rel=1e-3)
    assert metrics["eval_loss"] < 0.8
    layout = pairs.layout
    adapters = generator.generate_adapters({task: pairs.prompts(task) for task in pairs.tasks})
    for task, adapter in adapters.items():
        apart = {
            other: float(delta_weight_mse(adapter.state_dict(), pairs.state_dict(other), layout)) for other in adapters
        }
        assert min(apart, key=apart.__getitem__) == task


def test_fitting_to_canonical_targets(pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path) -> None:
    trainer, generator = fit(tmp_path, pairs, encoder_folder, canonical_targets=True, max_steps=2)
    canonical = pairs.with_canonical_factors()
    expected = canonical_state_dict(pairs.layout, pairs.state_dict("law", 1))
    assert all(torch.equal(m, expected[k]) for k, m in canonical.state_dict("law", 1).items())
    assert not torch.equal(
        pairs.state_dict("law", 1)[pairs.layout.tensors[0].key], expected[pairs.layout.tensors[0].key]
    )
    # Statistics, targets and evaluation are all taken on them.
    tokenizer = generator.weight_tokenizer
    torch.testing.assert_close(generator.normalization.mean, tokenizer.encode(canonical.mean_state_dict()))
    metrics = trainer.evaluate()
    target = generator.normalization.normalize(
        torch.stack([tokenizer.encode(canonical[i]["state_dict"]) for i in range(len(canonical))])
    )
    mean_adapter = masked_mse(torch.zeros_like(target), target, tokenizer.valid_mask())
    assert metrics["eval_mean_adapter_loss"] == pytest.approx(mean_adapter.item(), rel=1e-4)
    held_out = canonical.split(["law"])[1]
    assert torch.equal(
        held_out.state_dict("law", 1)[pairs.layout.tensors[0].key], expected[pairs.layout.tensors[0].key]
    )
    with pytest.raises(GeneratorConfigError, match=r"weight_loss.*'typo'"):
        DnDTrainingArguments(output_dir=str(tmp_path), weight_loss="typo", report_to="none")
