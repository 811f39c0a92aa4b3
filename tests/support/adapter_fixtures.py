# SPDX-License-Identifier: Apache-2.0
"""Fixtures of generated adapters, for files that say `pytest_plugins = ("support.adapter_fixtures",)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.generator.configuration import PromptConditionedLoraGeneratorConfig
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration.config import DnDConfig
from support.live_models import OTHER_PROMPTS, PROMPTS, logits


@pytest.fixture(scope="session")
def adapter(generator: PromptConditionedLoraGenerator) -> GeneratedAdapter:
    """The adapter of `PROMPTS`."""
    return generator.generate_adapter(PROMPTS)


@pytest.fixture(scope="session")
def other_adapter(generator: PromptConditionedLoraGenerator) -> GeneratedAdapter:
    """The adapter of `OTHER_PROMPTS`."""
    return generator.generate_adapter(OTHER_PROMPTS)


@pytest.fixture(scope="session")
def adapter_folder(adapter: GeneratedAdapter, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the adapter of `PROMPTS`."""
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    adapter.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def expected(adapter_folder: str, fresh_base: Callable[[], nn.Module]) -> torch.Tensor:
    """The logits of the base with the adapter of `PROMPTS`, as stock PEFT loads it."""
    return logits(PeftModel.from_pretrained(fresh_base(), adapter_folder))


@pytest.fixture
def dnd(generator_folder: Path) -> Callable[..., DnDConfig]:
    """Makes configurations for `PROMPTS`."""
    return lambda **fields: DnDConfig(**{"generator": str(generator_folder), "prompts": PROMPTS, **fields})


@pytest.fixture
def generator_for(encoder_folder: Path) -> Callable[[AdapterLayout], PromptConditionedLoraGenerator]:
    """Makes generators with random weights that pass for fitted."""

    def make(layout: AdapterLayout) -> PromptConditionedLoraGenerator:
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            layout,
            str(encoder_folder),
            num_prompts=4,
            max_prompt_length=8,
            decoder_type="hyper_convolution",
            decoder_config={"kernel_size": 3, "zero_init_output": False},
        )
        torch.manual_seed(0)
        model = PromptConditionedLoraGenerator(config).eval()
        shape = model.weight_tokenizer.grid_shape
        model.normalization.set_statistics(torch.randn(shape) * 0.1, torch.full((shape[0],), 0.1))
        return model

    return make
