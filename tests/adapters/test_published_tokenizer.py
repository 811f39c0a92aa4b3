# SPDX-License-Identifier: Apache-2.0
"""The released token format, against a loop written from its description alone."""

from __future__ import annotations

import math

import pytest
import torch
from support.released import PROJECTIONS

from peft_dnd import AdapterLayout, PromptConditionedLoraGeneratorConfig, PublishedTokenizer, WeightTokenizer
from peft_dnd.adapters.layout import LoraModule
from peft_dnd.errors import GeneratorConfigError, LayoutError


LAYERS = (0, 2, 10)
RANK, WIDTH = 4, 8


def module(name: str, sizes: tuple[int, int] = (16, 16), rank: int = RANK) -> LoraModule:
    return LoraModule(name, "linear", (rank, sizes[0]), (sizes[1], rank), 8.0)


@pytest.fixture(scope="module")
def layout() -> AdapterLayout:
    modules = [
        module(f"model.layers.{layer}.{name}", sizes) for layer in LAYERS for name, sizes in PROJECTIONS.items()
    ]
    return AdapterLayout(tuple(modules))


@pytest.fixture(scope="module")
def tokenizer(layout: AdapterLayout) -> PublishedTokenizer:
    return PublishedTokenizer(layout, WIDTH)


def adapter(layout: AdapterLayout, dtype: torch.dtype = torch.float32, size: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.key: (torch.randn(t.shape, generator=generator) * size + 0.001).to(dtype) for t in layout.tensors}


def chunks_in_order(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    chunks = []
    for layer in LAYERS:
        for name in PROJECTIONS:
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            for rows in (state[f"{key}A.weight"], state[f"{key}B.weight"].t()):
                chunks += [rows[:, start : start + WIDTH].clone() for start in range(0, rows.shape[1], WIDTH)]
    return chunks


def slow_encode(state: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = []
    for chunk in chunks_in_order(state):
        mean, deviation = chunk.mean(), chunk.std()
        codes = (mean * 8, torch.log(deviation * 0.9 + 0.1) + 1.6)
        token = torch.zeros(RANK + 2, WIDTH + 2)
        token[:RANK, :WIDTH] = (chunk - mean) / deviation
        for row in range(RANK + 2):
            for column in range(WIDTH + 2):
                if row >= RANK or column >= WIDTH:
                    token[row, column] = codes[column % 2]
        tokens.append(token)
    return torch.stack(tokens)


def slow_decode(layout: AdapterLayout, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = list(grid)
    state = {}
    for layer in LAYERS:
        for name, (inputs, outputs) in PROJECTIONS.items():
            for side, length in (("A", inputs), ("B", outputs)):
                rows = torch.cat([slow_chunk(tokens.pop(0)) for _ in range(length // WIDTH)], dim=1)
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{side}.weight"
                state[key] = rows if side == "A" else rows.t()
    return state


def slow_chunk(token: torch.Tensor) -> torch.Tensor:
    means, deviations = [], []
    for row in range(2):
        codes = []
        for column in range(2):
            below = token[RANK + row, column::2].mean()
            right = token[row::2, WIDTH + column].mean()
            codes.append((below + right) / 2)
        means.append(codes[0] / 8)
        deviations.append((torch.exp(codes[1] - 1.6) - 0.1) / 0.9)
    return token[:RANK, :WIDTH] * ((deviations[0] + deviations[1]) / 2) + (means[0] + means[1]) / 2


def test_encodes_as_released(layout: AdapterLayout, tokenizer: PublishedTokenizer) -> None:
    half = adapter(layout, torch.bfloat16)
    assert torch.equal(tokenizer.encode(half), slow_encode(half))
    full = adapter(layout)
    grid = tokenizer.encode(full)
    assert grid.shape == tokenizer.grid_shape == (len(chunks_in_order(full)), RANK + 2, WIDTH + 2)
    torch.testing.assert_close(grid, slow_encode(full), rtol=1e-5, atol=1e-6)
    out = torch.full(tokenizer.grid_shape, torch.nan)
    assert tokenizer.encode(full, out=out) is out and torch.equal(out, grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_as_released(layout: AdapterLayout, tokenizer: PublishedTokenizer, dtype: torch.dtype) -> None:
    # A decoder's tokens: no two entries of a margin agree.
    grid = torch.randn(tokenizer.grid_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = tokenizer.decode(grid), slow_decode(layout, grid)
    assert list(found) == [tensor.key for tensor in layout.tensors]
    for key, matrix in expected.items():
        torch.testing.assert_close(found[key], matrix, rtol=0, atol=0)


def test_a_token_by_hand() -> None:
    layout = AdapterLayout((module("model.layers.0.self_attn.q_proj", (4, 4), rank=2),))
    tensors = [tensor.key for tensor in layout.tensors]
    counted = torch.arange(1.0, 9.0).view(2, 4)
    grid = PublishedTokenizer(layout, 4).encode({tensors[0]: counted, tensors[1]: counted.view(2, 4).t() * 2})
    deviation = math.sqrt(6.0)  # of the sample: divided by 7, not by 8
    code = math.log(0.9 * deviation + 0.1) + 1.6
    assert grid[0, 0, 0].item() == pytest.approx(-3.5 / deviation)
    assert grid[0, 2].tolist() == pytest.approx([36.0, code] * 3)
    assert grid[0, :, 4].tolist() == pytest.approx([36.0] * 4)
    assert grid[0, :, 5].tolist() == pytest.approx([code] * 4)
    assert grid[1, 3, 4].item() == pytest.approx(72.0)
    assert torch.equal(grid[1, :2, :4], grid[0, :2, :4])


def test_there_and_back(layout: AdapterLayout, tokenizer: PublishedTokenizer) -> None:
    state = adapter(layout)
    for key in state:
        if ".lora_B." in key:
            state[key] = torch.zeros_like(state[key])  # as training finds it
    back = tokenizer.decode(tokenizer.encode(state))
    for key, matrix in state.items():
        torch.testing.assert_close(back[key], matrix, rtol=1e-5, atol=2e-7)


def test_half_precision_loses_the_scale(layout: AdapterLayout, tokenizer: PublishedTokenizer) -> None:
    def ratio(size: float, codec: WeightTokenizer) -> float:
        generator = torch.Generator().manual_seed(0)
        state = {t.key: (torch.randn(t.shape, generator=generator) * size).bfloat16() for t in layout.tensors}
        back = codec.decode(codec.encode(state).bfloat16())
        return float(sum(m.float().norm() for m in back.values()) / sum(m.float().norm() for m in state.values()))

    assert 4.5 < ratio(1e-4, tokenizer) < 6.5
    assert 0.45 < ratio(1e-3, tokenizer) < 0.65
    ours = WeightTokenizer(layout, WIDTH)
    assert ratio(1e-4, ours) == ratio(1e-3, ours) == 1.0


def test_all_entries_count_and_each_knows_its_tensor(layout: AdapterLayout, tokenizer: PublishedTokenizer) -> None:
    assert tokenizer.valid_mask().shape == tokenizer.grid_shape and tokenizer.valid_mask().all()
    marked = {t.key: torch.randn(t.shape) + 100.0 * i for i, t in enumerate(layout.tensors)}
    grid = tokenizer.encode(marked)
    assert torch.equal((grid[:, -1, 0] / 800).round().long(), tokenizer.tensor_index())
    of_first_layer = tokenizer.tensor_index().unique_consecutive().tolist()[:14:2]
    names = [layout.tensors[i].key.split(".")[-3] for i in of_first_layer]
    assert names == [name.rpartition(".")[2] for name in PROJECTIONS]


def test_gradients_flow_back(tokenizer: PublishedTokenizer) -> None:
    grid = torch.randn(tokenizer.grid_shape, requires_grad=True)
    sum(matrix.square().sum() for matrix in tokenizer.decode(grid).values()).backward()
    assert grid.grad is not None and (grid.grad != 0).all()


@pytest.mark.parametrize(
    ("modules", "width", "words"),
    [
        ([module("model.layers.0.self_attn.q_proj", rank=3)], 8, "even"),
        ([module("model.layers.0.self_attn.q_proj")], 5, "even"),
        ([module("model.layers.0.self_attn.q_proj")], 6, "chunk_width that divides"),
        (
            [module("model.layers.0.self_attn.qkv_proj")],
            8,
            "no place for the module 'model.layers.0.self_attn.qkv",
        ),
        ([module("embed.q_proj")], 8, "each with a number"),
        ([module("a.0.b.1.q_proj")], 8, "each with a number"),
        ([module("a.layers.0.q_proj"), module("b.layers.0.q_proj")], 8, "language layers alone"),
        ([module("a.layers.0.q_proj"), module("a.layers.1.q_proj", rank=2)], 8, "one rank"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(modules: list[LoraModule], width: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        PublishedTokenizer(AdapterLayout(tuple(modules)), width)


def test_wrong_grids_and_adapters_are_refused(layout: AdapterLayout, tokenizer: PublishedTokenizer) -> None:
    with pytest.raises(LayoutError, match="token grid of shape"):
        tokenizer.decode(torch.zeros(tokenizer.num_tokens, RANK, WIDTH))
    state = adapter(layout)
    key, _ = state.popitem()
    with pytest.raises(LayoutError, match=key):
        tokenizer.encode(state)


def test_a_configuration_selects_it(layout: AdapterLayout) -> None:
    def config(**settings: str) -> PromptConditionedLoraGeneratorConfig:
        return PromptConditionedLoraGeneratorConfig(layout=layout, chunk_width=WIDTH, **settings)

    assert type(config().weight_tokenizer()) is WeightTokenizer
    chosen = config(token_format="published", normalization="none")
    assert type(chosen.weight_tokenizer()) is PublishedTokenizer
    again = PromptConditionedLoraGeneratorConfig.from_dict(chosen.to_dict())
    assert again.weight_tokenizer().grid_shape == (chosen.weight_tokenizer().grid_shape)
    with pytest.raises(GeneratorConfigError, match="normalization='none'"):
        config(token_format="published")
    with pytest.raises(GeneratorConfigError, match="token_format"):
        config(token_format="release")
