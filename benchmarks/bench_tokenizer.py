# SPDX-License-Identifier: Apache-2.0
"""Adapter to normalised tokens and back, against three loops over chunks, for Qwen2.5-0.5B at rank 8.

The rivals, from the one that does most to the one that does least:

- published: what the format of arXiv 2506.16406 asks for: each chunk is standardised by itself, and its mean and
  standard deviation are written into two more rows and two more columns, from where the way back reads them;
- standardising: each chunk is standardised by itself, and the means and standard deviations are kept in lists;
- slicing: chunks are sliced and stacked, and put together again, with no normalisation at all. The tokenizer's own
  normalisation is part of what is measured against it.

Measured against them are the library's own tokens ("encode", "decode"), the same in memory that is used again each
time, as in a training loop ("reused"), and the published format without a loop ("published format").

python benchmarks/bench_tokenizer.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from record import ratio, spread, take_turns, write_result
from shapes import qwen_layout

from peft_dnd import AdapterLayout, WeightTokenizer
from peft_dnd.adapters import PublishedTokenizer, WeightNormalization


REPEATS = 25
SEED = 0
MARGIN = 2
OURS = ("", ", reused", ", published format")
LOOPS = ("published loop", "standardising loop", "slicing loop")


def main() -> None:
    """Measure, print and keep the figures."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    layout = qwen_layout("0.5b")
    tokenizer = WeightTokenizer(layout)
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(torch.randn(tokenizer.grid_shape), torch.rand(tokenizer.num_tokens) + 0.5)
    state = {tensor.key: torch.randn(tensor.shape) for tensor in layout.tensors}
    seconds = take_turns(contestants(layout, tokenizer, normalization, state), REPEATS)
    result = {
        "seed": SEED,
        "repeats": REPEATS,
        "parameters": layout.num_parameters,
        "grid": tokenizer.grid_shape,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": {
            f"{way}{ours}": {loop: ratio(seconds[f"{way}, {loop}"], seconds[way + ours]) for loop in LOOPS}
            for way in ("encode", "decode")
            for ours in OURS
        },
    }
    write_result("tokenizer", result)


def contestants(
    layout: AdapterLayout,
    tokenizer: WeightTokenizer,
    normalization: WeightNormalization,
    state: dict[str, torch.Tensor],
) -> dict[str, Callable[[], Any]]:
    """What is timed, after a check that every way there and back gives the adapter again."""
    width = tokenizer.chunk_width
    tokens = normalization.normalize(tokenizer.encode(state))
    sliced = slicing_encode(layout, state, width)
    standardised = standardising_encode(layout, state, width)
    published = published_encode(layout, state, width)
    format_of_release = PublishedTokenizer(layout, width)
    released = format_of_release.encode(state)
    memory = torch.empty(tokenizer.grid_shape)

    def encode(out: torch.Tensor | None = None) -> torch.Tensor:
        grid = tokenizer.encode(state, out=out)
        return normalization.normalize(grid, out=grid)

    assert torch.equal(sliced, tokenizer.encode(state))
    for back in (
        tokenizer.decode(normalization.denormalize(tokens)),
        slicing_decode(layout, sliced),
        standardising_decode(layout, *standardised),
        published_decode(layout, published),
        format_of_release.decode(released),
    ):
        assert all(torch.allclose(matrix, state[key], atol=1e-5) for key, matrix in back.items())

    return {
        "encode": encode,
        "encode, reused": lambda: encode(memory),
        "encode, published format": lambda: format_of_release.encode(state),
        "encode, published loop": lambda: published_encode(layout, state, width),
        "encode, standardising loop": lambda: standardising_encode(layout, state, width),
        "encode, slicing loop": lambda: slicing_encode(layout, state, width),
        "decode": lambda: tokenizer.decode(normalization.denormalize(tokens)),
        "decode, reused": lambda: tokenizer.decode(normalization.denormalize(tokens, out=memory)),
        "decode, published format": lambda: format_of_release.decode(released),
        "decode, published loop": lambda: published_decode(layout, published),
        "decode, standardising loop": lambda: standardising_decode(layout, *standardised),
        "decode, slicing loop": lambda: slicing_decode(layout, sliced),
    }


def chunks_of(layout: AdapterLayout, state: dict[str, torch.Tensor], width: int) -> list[torch.Tensor]:
    """The chunks as views, (rank, width) each. Sizes here are multiples of the width, so nothing is padded."""
    chunks = []
    for tensor in layout.tensors:
        rows = state[tensor.key] if tensor.side == "A" else state[tensor.key].t()
        for start in range(0, tensor.long_size, width):
            chunks.append(rows[:, start : start + width])
    return chunks


def matrices_of(layout: AdapterLayout, chunks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter whose chunks these are."""
    state = {}
    remaining = iter(chunks)
    width = chunks[0].shape[1]
    for tensor in layout.tensors:
        rows = torch.cat([next(remaining) for _ in range(0, tensor.long_size, width)], dim=1)
        state[tensor.key] = rows if tensor.side == "A" else rows.t().contiguous()
    return state


def slicing_encode(layout: AdapterLayout, state: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """One chunk after another, as it is."""
    return torch.stack(chunks_of(layout, state, width))


def slicing_decode(layout: AdapterLayout, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same way back."""
    return matrices_of(layout, list(grid))


def standardising_encode(
    layout: AdapterLayout, state: dict[str, torch.Tensor], width: int
) -> tuple[torch.Tensor, list[float], list[float]]:
    """Chunk after chunk, each brought to mean 0 and standard deviation 1."""
    tokens, means, deviations = [], [], []
    for chunk in chunks_of(layout, state, width):
        deviation, mean = (statistic.item() for statistic in torch.std_mean(chunk))
        tokens.append((chunk - mean).div_(deviation))
        means.append(mean)
        deviations.append(deviation)
    return torch.stack(tokens), means, deviations


def standardising_decode(
    layout: AdapterLayout, grid: torch.Tensor, means: list[float], deviations: list[float]
) -> dict[str, torch.Tensor]:
    """Chunk after chunk, each brought back to its own mean and standard deviation."""
    chunks = [(token * deviation).add_(mean) for token, mean, deviation in zip(grid, means, deviations, strict=True)]
    return matrices_of(layout, chunks)


def published_encode(layout: AdapterLayout, state: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """Chunk after chunk, standardised, with 8 mean and log(0.9 deviation + 0.1) + 1.6 repeated along two margins."""
    tokens = []
    for chunk in chunks_of(layout, state, width):
        deviation, mean = (statistic.item() for statistic in torch.std_mean(chunk))
        token = chunk.new_empty(chunk.shape[0] + MARGIN, width + MARGIN)
        torch.sub(chunk, mean, out=token[:-MARGIN, :-MARGIN]).div_(deviation)
        codes = torch.tensor([8.0 * mean, math.log(0.9 * deviation + 0.1) + 1.6])
        token[-MARGIN:].view(MARGIN, -1, 2).copy_(codes)
        token[:, -MARGIN:] = codes
        tokens.append(token)
    return torch.stack(tokens)


def published_decode(layout: AdapterLayout, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Chunk after chunk: mean and deviation from the average of the two margins, then back to the chunk."""
    chunks = []
    for token in grid:
        below = token[-MARGIN:].view(-1, 2).mean(0)
        beside = token[:, -MARGIN:].mean(0)
        mean, code = ((below + beside) / 2).tolist()
        deviation = (math.exp(code - 1.6) - 0.1) / 0.9
        chunks.append((token[:-MARGIN, :-MARGIN] * deviation).add_(mean / 8.0))
    return matrices_of(layout, chunks)


if __name__ == "__main__":
    main()
