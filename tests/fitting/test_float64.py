# SPDX-License-Identifier: Apache-2.0
"""Bases in float64, and torch's default dtype set to that, as some people of the sciences do."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.constants import TASK_PROMPTS
from support.fitting import fitting_arguments
from support.live_models import PROMPTS, TOKENS
from torch import nn

from peft_dnd import (
    DnDConfig,
    DnDTrainer,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.fitting.task_loss import TaskLoss


FreshBase = Callable[[], nn.Module]
ROWS = [{"input_ids": [5, 9, number, 41], "labels": [-100, -100, -100, 41]} for number in range(4)]
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.fixture
def float64() -> Iterator[None]:
    """Torch's default dtype is float64 within the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_adapters_and_losses_are_those_of_float32(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, float64: None, tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    plain = generator.generate_adapter(PROMPTS)
    torch.set_default_dtype(torch.float64)
    adapter = generator.generate_adapter(PROMPTS)
    assert all(torch.equal(adapter.state_dict()[key], value) for key, value in plain.state_dict().items())
    expected = plain.load_into(fresh_base()).eval()(**BATCH).loss.item()
    base = fresh_base().double()
    assert adapter.load_into(copy.deepcopy(base)).eval()(**BATCH).loss.item() == pytest.approx(expected, rel=1e-4)
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    assert get_peft_model(copy.deepcopy(base), config).eval()(**BATCH).loss.item() == pytest.approx(expected, rel=1e-4)
    adapter.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert stock(**BATCH).loss.item() == pytest.approx(expected, rel=1e-4)

    matrices = {key: value.clone().requires_grad_() for key, value in adapter.state_dict().items()}
    stacked = {key: torch.stack([value, value]) for key, value in matrices.items()}
    loss_of = TaskLoss(base, generator.config.adapter_layout)
    losses = loss_of.losses(stacked, [BATCH, BATCH])
    assert losses.dtype == torch.float32 and loss_of.shares_passes
    assert losses.tolist() == pytest.approx([expected, expected], rel=1e-4)
    losses.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in matrices.values())


@pytest.mark.parametrize("decoder", ["set_transformer", "core"])
def test_fitting(
    decoder: str,
    pairs_folder: Path,
    encoder_folder: Path,
    fresh_base: FreshBase,
    float64: None,
    tmp_path: Path,
) -> None:
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    for task in TASK_PROMPTS:
        write_examples(tmp_path / "pairs" / task, ROWS)
    data = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(data, str(encoder_folder), decoder_type=decoder)
    arguments = fitting_arguments(tmp_path / "fit", max_steps=12, task_loss_weight=1.0, task_examples=2)
    trainer = DnDTrainer(
        PromptConditionedLoraGenerator(config), arguments, data, data, base_model=fresh_base().double()
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    trainer.model.save_pretrained(tmp_path / "generator")
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
    adapter = again.generate_adapter(PROMPTS)
    assert all(torch.isfinite(value).all() for value in adapter.state_dict().values())
