# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What several test files need of generators: fixtures (`pytest_plugins = ("generators",)`) and plain functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_dnd.adapter import GeneratedAdapter
from peft_dnd.configuration import PromptConditionedLoraGeneratorConfig
from peft_dnd.layout import AdapterLayout
from peft_dnd.modeling import PromptConditionedLoraGenerator


PROMPTS = ["what is the capital ?", "what colour is the river ?", "a law , please"]
OTHER_PROMPTS = ["which medicine , doctor ?", "what is a tax ?"]
TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])


def tiny_generator(layout: AdapterLayout, encoder_folder: Path, seed: int = 0) -> PromptConditionedLoraGenerator:
    """A generator with random weights whose adapters are sizeable and depend on the prompts."""
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        text_encoder=str(encoder_folder),
        num_prompts=4,
        max_length=8,
        decoder_config={"zero_init_output": False, "kernel_size": 3},
    )
    torch.manual_seed(seed)
    generator = PromptConditionedLoraGenerator(config)
    mean, scale = generator.normalization.mean, generator.normalization.scale
    generator.normalization.set_statistics(torch.zeros_like(mean), torch.full_like(scale, 0.1))
    return generator.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """What a model gives for a fixed batch of tokens, in eval mode."""
    model.eval()
    with torch.no_grad():
        output = model(input_ids=TOKENS)
    return (output.logits if hasattr(output, "logits") else output[0]).float()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must not have changed when a model is said to be untouched."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": sorted(getattr(model, "peft_config", None) or {}),
        "has_adapters": getattr(model, "_hf_peft_config_loaded", None),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare with an earlier snapshot."""
    after = snapshot(model)
    weights_before, weights_after = before.pop("weights"), after.pop("weights")
    assert after == before
    assert list(weights_after) == list(weights_before)
    assert all(torch.equal(weights_after[name], weights_before[name]) for name in weights_before)


@pytest.fixture(scope="session")
def session_layout(base_model: nn.Module) -> AdapterLayout:
    """Rank 3 on all linear layers of `base_model`."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    return AdapterLayout.from_lora_config(config, base_model)


@pytest.fixture(scope="session")
def generator(session_layout: AdapterLayout, encoder_folder: Path) -> PromptConditionedLoraGenerator:
    """A generator for `base_model`."""
    return tiny_generator(session_layout, encoder_folder)


@pytest.fixture(scope="session")
def generator_folder(generator: PromptConditionedLoraGenerator, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of that generator."""
    folder = tmp_path_factory.mktemp("generator") / "saved"
    generator.save_pretrained(folder)
    return str(folder)


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
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(fresh_base(), adapter_folder))
