# SPDX-License-Identifier: Apache-2.0
"""How much of an adapter's scale survives its tokens: the released token format beside our own.

An adapter of Qwen2.5-0.5B's shapes is turned to tokens and back, with tokens in float32 and in bfloat16, for standard
deviations of B from 1e-5 to 1e-1; A's is 1e-2 throughout. The released format computes in bfloat16 where its tokens
are, as the published code does on the CPU. Ours is given normalised tokens, as a decoder writes them, from statistics
of eight adapters.

python benchmarks/bench_codecs.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from record import write_result
from shapes import qwen_layout

from peft_dnd import AdapterLayout, PublishedTokenizer, WeightTokenizer
from peft_dnd.adapters import WeightNormalization, weight_statistics


DEVIATIONS_OF_B = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
DEVIATION_OF_A = 1e-2
TRAINING_ADAPTERS = 8
SEED = 0

State = dict[str, torch.Tensor]


def main() -> None:
    """Measure, print and keep the figures."""
    torch.set_num_threads(1)
    layout = qwen_layout("0.5b")
    rows = []
    for deviation in DEVIATIONS_OF_B:
        adapters = [draw(layout, deviation, SEED + number) for number in range(TRAINING_ADAPTERS + 1)]
        for dtype in (torch.float32, torch.bfloat16):
            for name, back in (
                ("published", published_round_trip(layout, adapters[0], dtype)),
                ("ours", our_round_trip(layout, adapters, dtype)),
            ):
                row = {"codec": name, "tokens": str(dtype).removeprefix("torch."), "deviation_of_b": deviation}
                rows.append(row | compare(adapters[0], back, "lora_B"))
    result = {
        "layout": {"parameters": layout.num_parameters, "matrices": len(layout.tensors)},
        "deviation_of_a": DEVIATION_OF_A,
        "training_adapters": TRAINING_ADAPTERS,
        "seed": SEED,
        "rows": rows,
    }
    write_result("codecs", result)


def draw(layout: AdapterLayout, deviation_of_b: float, seed: int) -> State:
    """A random adapter."""
    generator = torch.Generator().manual_seed(seed)
    deviation = {"A": DEVIATION_OF_A, "B": deviation_of_b}
    return {t.key: torch.randn(t.shape, generator=generator) * deviation[t.side] for t in layout.tensors}


def published_round_trip(layout: AdapterLayout, adapter: State, dtype: torch.dtype) -> State:
    """To the released tokens and back, all of it in one dtype."""
    codec = PublishedTokenizer(layout)
    tokens = codec.encode({key: matrix.to(dtype) for key, matrix in adapter.items()})
    return codec.decode(tokens.to(dtype))


def our_round_trip(layout: AdapterLayout, adapters: list[State], dtype: torch.dtype) -> State:
    """To normalised tokens of one dtype and back; the statistics are float32, as a generator keeps them."""
    codec = WeightTokenizer(layout)
    normalization = WeightNormalization(codec.grid_shape)
    normalization.set_statistics(*weight_statistics(codec, [(codec.encode(other), 1.0) for other in adapters[1:]]))
    tokens = normalization.normalize(codec.encode(adapters[0])).to(dtype)
    return codec.decode(normalization.denormalize(tokens))


def compare(adapter: Mapping[str, torch.Tensor], back: Mapping[str, torch.Tensor], what: str) -> dict[str, Any]:
    """Relative error of all matrices of one side together, and by which factor their size has changed."""
    before = torch.cat([matrix.flatten() for key, matrix in adapter.items() if what in key])
    after = torch.cat([back[key].float().flatten() for key in adapter if what in key])
    return {
        "relative_error": float((after - before).norm() / before.norm()),
        "size_after_over_before": float(after.norm() / before.norm()),
    }


if __name__ == "__main__":
    main()
