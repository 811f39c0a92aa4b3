# SPDX-License-Identifier: Apache-2.0
"""Looking at live models from outside: what they give, and whether anything about them has changed."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.lora import live_state_dict


PROMPTS = ["what is the capital ?", "what colour is the river ?", "a law , please"]
OTHER_PROMPTS = ["which medicine , doctor ?", "what is a tax ?"]
TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])


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


def assert_holds(model: nn.Module, name: str, adapter: GeneratedAdapter) -> None:
    """The model's adapter of that name has the generated matrices, and a plain configuration."""
    live, generated = (
        {key.rpartition("model.")[2].removeprefix("transformer."): tensor for key, tensor in state.items()}
        for state in (live_state_dict(model, name), adapter.state_dict())
    )
    assert set(live) == set(generated)
    assert all(torch.equal(live[key], tensor) for key, tensor in generated.items())
    assert type(model.peft_config[name]) is LoraConfig
    assert model.peft_config[name].init_lora_weights is True
