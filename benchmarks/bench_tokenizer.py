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
"""Adapter to normalised tokens and back, against loops over chunks, for the layout of Qwen2.5-0.5B at rank 8.

Two rivals: a loop that standardises each chunk by itself, as the published way of doing it asks for, and one that only
slices and stacks, which does less than the tokenizer does.

python benchmarks/bench_tokenizer.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config

from peft_dnd import AdapterLayout, WeightTokenizer
from peft_dnd.tokenizer import WeightNormalization


RESULT = Path(__file__).parent / "results" / "tokenizer.json"
REPEATS = 15


def main() -> None:
    """Measure, print and keep the figures."""
    torch.set_num_threads(1)
    layout = qwen_layout()
    tokenizer = WeightTokenizer(layout)
    state = {tensor.key: torch.randn(tensor.shape) for tensor in layout.tensors}
    grid = tokenizer.encode(state)
    assert torch.equal(grid, loop_encode(layout, state, tokenizer.chunk_width))
    assert all(torch.equal(matrix, state[key]) for key, matrix in loop_decode(layout, grid).items())

    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(torch.randn(grid.shape), torch.rand(len(grid)) + 0.5)
    tokens, means, deviations = standardising_encode(layout, state, tokenizer.chunk_width)
    back = standardising_decode(layout, tokens, means, deviations)
    assert all(torch.allclose(matrix, state[key], atol=1e-5) for key, matrix in back.items())

    width = tokenizer.chunk_width
    contestants: dict[str, Callable[[], Any]] = {
        "encode": lambda: normalization.normalize(tokenizer.encode(state)),
        "encode, standardising loop": lambda: standardising_encode(layout, state, width),
        "encode, slicing loop": lambda: loop_encode(layout, state, width),
        "decode": lambda: tokenizer.decode(normalization.denormalize(grid)),
        "decode, standardising loop": lambda: standardising_decode(layout, tokens, means, deviations),
        "decode, slicing loop": lambda: loop_decode(layout, grid),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS):  # taking turns, so that all meet the same machine
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    seconds = {name: median(values) for name, values in times.items()}
    result = {
        "command": "python benchmarks/bench_tokenizer.py",
        "parameters": layout.num_parameters,
        "grid": tokenizer.grid_shape,
        "threads": 1,
        "median_seconds": seconds,
        "times_faster": {
            f"{way} than a {loop} loop": round(seconds[f"{way}, {loop} loop"] / seconds[way], 1)
            for way in ("encode", "decode")
            for loop in ("standardising", "slicing")
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def qwen_layout() -> AdapterLayout:
    """Rank 8 on all linear layers of Qwen2.5-0.5B's architecture: 4.40M parameters."""
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    return AdapterLayout.from_lora_config(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), base)


def loop_encode(layout: AdapterLayout, state: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """The plain way: one chunk after another. Sizes here are multiples of the width, so nothing is padded."""
    tokens = []
    for tensor in layout.tensors:
        rows = state[tensor.key] if tensor.side == "A" else state[tensor.key].t()
        for start in range(0, tensor.long_size, width):
            tokens.append(rows[:, start : start + width])
    return torch.stack(tokens)


def loop_decode(layout: AdapterLayout, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain way back."""
    state = {}
    position, width = 0, grid.shape[2]
    for tensor in layout.tensors:
        chunks = []
        for _ in range(0, tensor.long_size, width):
            chunks.append(grid[position])
            position += 1
        rows = torch.cat(chunks, dim=1)
        state[tensor.key] = rows if tensor.side == "A" else rows.t().contiguous()
    return state


def standardising_encode(
    layout: AdapterLayout, state: dict[str, torch.Tensor], width: int
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Chunk after chunk, each brought to mean 0 and standard deviation 1."""
    tokens, means, deviations = [], [], []
    for tensor in layout.tensors:
        rows = state[tensor.key] if tensor.side == "A" else state[tensor.key].t()
        for start in range(0, tensor.long_size, width):
            chunk = rows[:, start : start + width]
            means.append(chunk.mean())
            deviations.append(chunk.std())
            tokens.append((chunk - means[-1]) / deviations[-1])
    return torch.stack(tokens), means, deviations


def standardising_decode(
    layout: AdapterLayout, grid: torch.Tensor, means: list[torch.Tensor], deviations: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Chunk after chunk, each brought back to its own mean and standard deviation."""
    whole = [token * deviation + mean for token, mean, deviation in zip(grid, means, deviations, strict=True)]
    return loop_decode(layout, torch.stack(whole))


if __name__ == "__main__":
    main()
