# SPDX-License-Identifier: Apache-2.0
"""Configurations of PEFT's methods, small enough for the tests' base, and adapters of them with random numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn


QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# What PEFT injects into a model.
INJECTED: dict[str, PeftConfig] = {
    "DoRA": LoraConfig(r=3, use_dora=True, **QV),
    "LoRA with a whole module": LoraConfig(r=3, modules_to_save=["norm"], **QV),
    "LoRA with tokens": LoraConfig(r=3, trainable_token_indices=[1, 2], **QV),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(r=8, **QV),
    "LoHa": LoHaConfig(r=3, **QV),
    "LoKr": LoKrConfig(r=3, **QV),
    "OFT": OFTConfig(oft_block_size=4, **QV),
    "HRA": HRAConfig(r=2, **QV),
    "FourierFT": FourierFTConfig(n_frequency=10, **QV),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": TrainableTokensConfig(token_indices=[1, 2, 3]),
    "AdaLoRA": AdaLoraConfig(total_step=10, init_r=3, **QV),
    "VB-LoRA": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, **QV),
    "C3A": C3AConfig(block_size=4, **QV),
}
SOFT: dict[str, PeftConfig] = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
}
METHODS = {**INJECTED, **SOFT}


def trained(base: nn.Module, config: PeftConfig, seed: int = 0) -> PeftModel:
    """A model whose adapter's numbers are drawn from a seed."""
    model = get_peft_model(base, copy.deepcopy(config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model
