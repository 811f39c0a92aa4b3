# SPDX-License-Identifier: Apache-2.0
"""Files in the release's formats, built from their description, with random weights and of small size."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch


BASE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# In the order of the release; in the layout's own order down, gate and up come before k, o, q and v.
PROJECTIONS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 8),
    "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16),
    "mlp.up_proj": (16, 24),
    "mlp.gate_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}
RANK, WIDTH, KERNEL, SIZE = 2, 8, 3, 16
NUM_TOKENS = 2 * sum((a + b) // WIDTH for a, b in PROJECTIONS.values())
SHORT, LONG = 20, 80  # the text encoder has 40 positions
PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please", "law ."]


def cascade(length: int) -> list[list[int]]:
    # The middle layer keeps its shape and so has a residual.
    return [[4, length, SIZE], [6, 5, 12], [6, 5, 12], [NUM_TOKENS, RANK + 2, WIDTH + 2]]


def settings_file(folder: Path, projected: bool, encoder: str | None = None) -> Path:
    decoder = {"cascade": cascade(7 if projected else SHORT), "kernel_size": KERNEL, "zero_init_output": False}
    if projected:
        decoder["length_projection"] = {"length": 7}
    data = {
        "title": "tiny",
        "source": "this test",
        "base_model": "some/base",
        "base_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **BASE},
        "lora": {
            "r": RANK,
            "lora_alpha": 4,
            "target_modules": [name.rpartition(".")[2] for name in PROJECTIONS],
            "task_type": "CAUSAL_LM",
        },
        "generator": {
            "text_encoder": encoder,
            "num_prompts": 4,
            "max_prompt_length": LONG if projected else SHORT,
            "condition_size": SIZE,
            "token_format": "published",
            "chunk_width": WIDTH,
            "normalization": "none",
            "decoder_type": "hyper_convolution",
            "decoder_config": decoder,
        },
        "training": {},
        "batch_size": 2,
        "checkpoints_per_task": 2,
    }
    path = folder / "tiny.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def released_state(projected: bool) -> dict[str, torch.Tensor]:
    """Random weights under the release's names, of shapes by its rules."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)

    state = {"criterion_weight": torch.rand(1, NUM_TOKENS, 1, 1, generator=generator) + 0.1}
    shapes = cascade(7 if projected else SHORT)
    for i, ((n, rows, c), (n2, rows2, c2)) in enumerate(itertools.pairwise(shapes)):
        layer = f"model.decoder.module_list.{i}."
        state |= {
            f"{layer}linear1.norm.weight": 1 + 0.1 * draw(rows, c),
            f"{layer}linear1.norm.bias": 0.1 * draw(rows, c),
            f"{layer}linear1.conv1w.weight": draw(c2, c, KERNEL, KERNEL),
            f"{layer}linear1.conv1h.weight": draw(rows2, rows, KERNEL, KERNEL),
            f"{layer}linear1.conv2h.weight": draw(rows2, rows, KERNEL, KERNEL),
            f"{layer}linear1.conv2w.weight": draw(c2, c, KERNEL, KERNEL),
            f"{layer}linear1.bias": draw(rows2, c2),
            f"{layer}linear2.weight": draw(n2, n, KERNEL, KERNEL),
            f"{layer}linear2.bias": draw(n2),
        }
    if projected:
        for name, size in (("down_proj", LONG), ("gate_proj", 7)):
            state |= {f"{name}.weight": draw(7, size), f"{name}.bias": draw(7)}
    return state


def released_adapter(seed: int, prefix: str = "", root: str = "model.layers") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(2):
        for name, (inputs, outputs) in PROJECTIONS.items():
            key = f"{prefix}{root}.{layer}.{name}.lora_"
            state[f"{key}A.weight"] = (torch.randn(RANK, inputs, generator=generator) * 0.1).bfloat16()
            state[f"{key}B.weight"] = (torch.randn(outputs, RANK, generator=generator) * 0.1).bfloat16()
    return state


def save(data: Any, path: Path, **keywords: Any) -> None:
    """Write a pickle, as the release is made of."""
    torch.save(data, path, **keywords)  # noqa: TID251
