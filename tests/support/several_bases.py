# SPDX-License-Identifier: Apache-2.0
"""A generator of three bases, for files that say `pytest_plugins = ("support.several_bases",)`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dnd import (
    AdapterLayout,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from support.constants import LORA_CONFIG, TASK_PROMPTS


PROMPTS = TASK_PROMPTS["law"]
SIZES = {"org/small-1.5": (24, 2), "org/wide": (40, 1), "org/deep": (16, 3)}


def base_of(name: str, size: tuple[int, int] | None = None, window: int = 64) -> nn.Module:
    """A Llama of a width and depth, called so."""
    width, depth = size or SIZES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 40, "num_hidden_layers": depth, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=window, **sizes)).eval()
    model.name_or_path = model.config._name_or_path = name
    return model


@pytest.fixture(scope="session")
def bases() -> dict[str, nn.Module]:
    return {name: base_of(name) for name in SIZES}


def layout_for(base: nn.Module, rank: int = 3) -> AdapterLayout:
    config = copy.deepcopy(LORA_CONFIG)
    config.r = rank
    config.base_model_name_or_path = base.name_or_path
    return AdapterLayout.from_lora_config(config, base)


def fitted(generator: PromptConditionedLoraGenerator) -> PromptConditionedLoraGenerator:
    """The generator, which now passes for fitted."""
    for number, name in enumerate(generator.config.base_names):
        one = generator.for_base(name)
        shape = one.weight_tokenizer.grid_shape
        mean = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.1
        one.normalization.set_statistics(mean, torch.full((shape[0],), 0.1))
    return generator.eval()


def make(layouts: Any, encoder: Any, decoder_type: str = "set_transformer", **settings: Any) -> Any:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layouts,
        str(encoder),
        num_prompts=4,
        max_prompt_length=16,
        decoder_type=decoder_type,
        decoder_config={"zero_init_output": False, **settings},
    )
    torch.manual_seed(0)
    return fitted(PromptConditionedLoraGenerator(config))


@pytest.fixture(scope="session")
def layouts(bases: dict[str, nn.Module]) -> dict[str, AdapterLayout]:
    return {name.rpartition("/")[2]: layout_for(base, 3 + len(name) % 2) for name, base in bases.items()}


@pytest.fixture(scope="session")
def several(layouts: dict[str, AdapterLayout], encoder_folder: Path) -> PromptConditionedLoraGenerator:
    """A generator of three bases; not to be changed."""
    return make(layouts, encoder_folder)


@pytest.fixture(scope="session")
def folder(several: PromptConditionedLoraGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "generator"
    several.save_pretrained(folder)
    return folder


def weights(adapter: Any) -> dict[str, torch.Tensor]:
    return dict(adapter.state_dict())


def assert_same(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=tolerance)
