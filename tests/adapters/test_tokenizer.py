# SPDX-License-Identifier: Apache-2.0
"""State dict to token grid and back is exact, whatever the layout."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from shapes import qwen_layout
from torch import nn

from peft_dnd.adapters.layout import AdapterLayout, LoraModule
from peft_dnd.adapters.tokenizer import WeightNormalization, WeightTokenizer, choose_chunk_width, weight_statistics
from peft_dnd.errors import GeneratorConfigError, LayoutError


def random_state(layout: AdapterLayout, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i, tensor in enumerate(layout.tensors):
        # Sizes from 1e-6 to 1e3, side by side, as lora_A and lora_B are in real adapters.
        scale = 10.0 ** (i % 10 - 6)
        state[tensor.key] = (torch.randn(tensor.shape, generator=generator) * scale).to(dtype)
    return state


def odd_layout() -> AdapterLayout:
    return AdapterLayout(
        (
            LoraModule("embed", "embedding", (2, 53), (17, 2), 4.0),
            LoraModule("conv", "linear", (3, 5, 3, 3), (7, 3, 1, 1), 4.0),
            LoraModule("layers.0.q", "linear", (4, 31), (1, 4), 4.0),
            LoraModule("layers.1.q", "linear", (4, 31), (1, 4), 4.0),
            LoraModule("layers.1.v", "linear", (1, 64), (128, 1), 4.0),
        )
    )


def slow_encode(layout: AdapterLayout, state: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """The definition, chunk by chunk and number by number."""
    tokens = []
    for tensor in layout.tensors:
        matrix = state[tensor.key].reshape((tensor.rank, -1) if tensor.side == "A" else (-1, tensor.rank))
        rows = matrix if tensor.side == "A" else matrix.t()
        for start in range(0, tensor.long_size, width):
            token = torch.zeros(layout.max_rank, width)
            for column in range(start, min(start + width, tensor.long_size)):
                token[: tensor.rank, column - start] = rows[:, column]
            tokens.append(token)
    return torch.stack(tokens)


@pytest.mark.parametrize("width", [1, 7, 16, 31, 64, 1000])
def test_exact_and_as_defined_on_sizes_that_no_chunk_divides(width: int) -> None:
    layout = odd_layout()
    tokenizer = WeightTokenizer(layout, width)
    state = random_state(layout)
    grid = tokenizer.encode(state)
    assert tuple(grid.shape) == tokenizer.grid_shape
    assert torch.equal(grid, slow_encode(layout, state, width))
    back = tokenizer.decode(grid)
    assert list(back) == [tensor.key for tensor in layout.tensors]
    assert all(torch.equal(back[key], state[key]) and back[key].is_contiguous() for key in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_come_back_whole(layout: AdapterLayout, dtype: torch.dtype) -> None:
    tokenizer = WeightTokenizer(layout)
    state = random_state(layout, dtype=dtype)
    back = tokenizer.decode(tokenizer.encode(state))
    assert all(torch.equal(back[key].to(dtype), state[key]) for key in state)


def test_writes_into_memory_that_is_given() -> None:
    layout = odd_layout()
    tokenizer = WeightTokenizer(layout, 7)
    state = random_state(layout)
    batch = torch.full((2, *tokenizer.grid_shape), torch.nan)
    assert tokenizer.encode(state, out=batch[1]).data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], tokenizer.encode(state))
    assert batch[0].isnan().all()
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(torch.randn(tokenizer.grid_shape), torch.rand(tokenizer.num_tokens) + 0.5)
    tokens = normalization.normalize(batch[1])
    normalization.normalize(batch[1], out=batch[1])
    assert torch.equal(batch[1], tokens)
    weights = normalization.denormalize(tokens)
    normalization.denormalize(tokens, out=tokens)
    assert torch.equal(tokens, weights)
    with pytest.raises(LayoutError, match="token grid"):
        tokenizer.encode(state, out=batch)


@pytest.mark.parametrize("width", [31, 64, 1000])
def test_decoded_tensors_are_nobody_elses(width: int) -> None:
    tokenizer = WeightTokenizer(odd_layout(), width)
    grid = torch.randn(tokenizer.grid_shape)
    before = grid.clone()
    state = tokenizer.decode(grid)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(grid, before)


def test_filling_is_known(layout: AdapterLayout) -> None:
    for some in (layout, odd_layout()):
        tokenizer = WeightTokenizer(some, 10)
        mask = tokenizer.valid_mask()
        assert int(mask.sum()) == some.num_parameters
        assert not tokenizer.encode(random_state(some))[~mask].any()
        # What stands in the filling does not matter on the way back.
        grid = tokenizer.encode(random_state(some))
        spoilt = torch.where(mask, grid, torch.nan)
        assert all(torch.isfinite(tensor).all() for tensor in tokenizer.decode(spoilt).values())


def test_tokens_know_their_tensor() -> None:
    layout = odd_layout()
    tokenizer = WeightTokenizer(layout, 16)
    index = tokenizer.tensor_index()
    assert index.bincount().tolist() == [math.ceil(tensor.long_size / 16) for tensor in layout.tensors]


def test_decoding_is_differentiable(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    grid = torch.randn(tokenizer.grid_shape, requires_grad=True)
    sum(tensor.square().sum() for tensor in tokenizer.decode(grid).values()).backward()
    assert torch.allclose(grid.grad, 2 * grid * tokenizer.valid_mask())


@pytest.mark.parametrize(("size", "width"), [("0.5b", 128), ("1.5b", 256), ("7b", 512)])
def test_chunk_widths_of_the_paper(size: str, width: int) -> None:
    assert choose_chunk_width(qwen_layout(size)) == width


def test_normalisation_comes_back_within_a_millionth(base_model: nn.Module) -> None:
    layout = AdapterLayout.from_lora_config(LoraConfig(r=4, target_modules="all-linear"), base_model)
    tokenizer = WeightTokenizer(layout)
    states = [random_state(layout, seed) for seed in range(5)]
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(*weight_statistics(tokenizer, ((tokenizer.encode(s), 1.0) for s in states)))
    for state in [*states, random_state(layout, 99)]:
        tokens = normalization.normalize(tokenizer.encode(state))
        back = tokenizer.decode(normalization.denormalize(tokens))
        for key, matrix in state.items():
            assert (back[key] - matrix).norm() <= 1e-6 * matrix.norm()


def test_normalised_training_adapters_have_unit_spread_in_every_tensor(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    grids = [tokenizer.encode(random_state(layout, seed)) for seed in range(6)]
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(*weight_statistics(tokenizer, ((grid, 2.0) for grid in grids)))
    tokens = torch.stack([normalization.normalize(grid) for grid in grids])
    assert tokens.mean(0).abs().max() < 1e-5
    for matrices in zip(*(tokenizer.decode(token).values() for token in tokens), strict=True):
        assert torch.stack(matrices).square().mean() == pytest.approx(1.0, rel=1e-4)
    zeros = torch.zeros(tokenizer.grid_shape)
    assert torch.equal(normalization.denormalize(zeros), torch.stack(grids).double().mean(0).float())


def test_tensors_that_no_adapter_moved_stay_exact(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    state = random_state(layout)
    moved = {**state, layout.tensors[0].key: state[layout.tensors[0].key] + 1.0}
    grids = [tokenizer.encode(some) for some in (state, moved)]
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(*weight_statistics(tokenizer, ((grid, 1.0) for grid in grids)))
    assert (normalization.scale > 0).all()
    # A decoder that is off by one everywhere must not blow up what all adapters agree on.
    off = tokenizer.decode(normalization.denormalize(torch.ones(tokenizer.grid_shape)))
    unmoved = layout.tensors[2].key
    assert torch.allclose(off[unmoved], state[unmoved], atol=1e-5, rtol=1e-4)


def test_without_statistics_nothing_changes(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    normalization = WeightNormalization(tokenizer.grid_shape)
    grid = tokenizer.encode(random_state(layout))
    assert torch.equal(normalization.denormalize(normalization.normalize(grid)), grid)


def test_weights_of_tasks_count() -> None:
    layout = AdapterLayout((LoraModule("q", "linear", (1, 2), (2, 1), 1.0),))
    tokenizer = WeightTokenizer(layout, 2)
    grids = [tokenizer.encode({t.key: torch.full(t.shape, v) for t in layout.tensors}) for v in (0.0, 4.0)]
    mean, scale = weight_statistics(tokenizer, [(grids[0], 3.0), (grids[1], 1.0)])
    assert torch.equal(mean, torch.ones_like(mean))
    assert scale.tolist() == pytest.approx([math.sqrt(3.0)] * 2)
    with pytest.raises(ValueError, match="at least one adapter"):
        weight_statistics(tokenizer, [])


def test_errors_name_the_tensor(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    state = random_state(layout)
    key = layout.tensors[1].key
    with pytest.raises(LayoutError, match="is missing"):
        tokenizer.encode({name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(LayoutError, match="has shape"):
        tokenizer.encode({**state, key: state[key].t()})
    with pytest.raises(LayoutError, match="token grid"):
        tokenizer.decode(torch.zeros(1, 2, 3))
    with pytest.raises(GeneratorConfigError, match="chunk_width"):
        WeightTokenizer(layout, 0)


def test_the_statistics_keep_their_precision_when_the_module_around_them_is_cast(layout: AdapterLayout) -> None:
    statistics = WeightNormalization(WeightTokenizer(layout).grid_shape)
    mean = torch.randn(statistics.mean.shape)
    statistics.set_statistics(mean, statistics.scale / 3)
    model = nn.Sequential(nn.Linear(2, 2), statistics)
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        cast()
        assert model[0].weight.dtype != torch.float32
        assert torch.equal(statistics.mean, mean) and statistics.scale.dtype == torch.float32
    assert model.double()[1].mean.dtype == torch.float64
    assert model.to("meta")[1].mean.is_meta
