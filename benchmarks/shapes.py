# SPDX-License-Identifier: Apache-2.0
"""Adapter layouts of real base models, from their architectures' sizes: nothing is downloaded or allocated."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config

from peft_dnd import AdapterLayout


# Qwen2.5, as published in each model's config.json.
QWEN_SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
# The paper's rank for each, with alpha twice the rank.
PAPER_RANKS = {"0.5b": 8, "1.5b": 16, "7b": 16}


@cache
def qwen_layout(size: str = "0.5b", rank: int | None = None) -> AdapterLayout:
    """LoRA on all seven projections of every layer of a Qwen2.5.

    Args:
        size: `"0.5b"`, `"1.5b"` or `"7b"`.
        rank: The adapters' rank; `None` takes the paper's.
    """
    rank = PAPER_RANKS[size] if rank is None else rank
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN_SIZES[size]))
    return AdapterLayout.from_lora_config(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), base)
