# SPDX-License-Identifier: Apache-2.0
"""Bases of several widths and depths, and a generator for them that passes for fitted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from support.constants import LORA_CONFIG


SIZES = {"org/small-1.5": (24, 2), "org/wide": (40, 1), "org/deep": (16, 3)}


def base_of(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """A Llama of a width and depth, called so."""
    width, depth = size or SIZES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 40, "num_hidden_layers": depth, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    model.name_or_path = model.config._name_or_path = name
    return model


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


def layouts_of(bases: Mapping[str, nn.Module]) -> dict[str, AdapterLayout]:
    """Layouts of unlike ranks, by the last part of the bases' names."""
    return {name.rpartition("/")[2]: layout_for(base, 3 + len(name) % 2) for name, base in bases.items()}


def weights(adapter: Any) -> dict[str, torch.Tensor]:
    return dict(adapter.state_dict())


def assert_same(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=tolerance)
