# SPDX-License-Identifier: Apache-2.0
"""Distances of ΔW and canonical factors, against ΔW itself in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_dnd import AdapterLayout
from peft_dnd.adapters.factors import (
    canonical_factors,
    canonical_state_dict,
    delta_weight_distance,
    delta_weight_distances,
    delta_weight_mse,
)
from peft_dnd.adapters.layout import LoraModule
from peft_dnd.errors import LayoutError


Factors = tuple[torch.Tensor, torch.Tensor]


def factors(seed: int, m: int = 13, n: int = 17, rank: int = 4, batch: tuple[int, ...] = ()) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, rank, n, generator=generator), torch.randn(*batch, m, rank, generator=generator)


def distance(first: Factors, second: Factors) -> torch.Tensor:
    (a, b), (c, d) = ((x.double() for x in pair) for pair in (first, second))
    return (b @ a - d @ c).square().sum((-2, -1))


def regauged(a: torch.Tensor, b: torch.Tensor, seed: int = 5) -> Factors:
    """Other factors of the same update, in float64."""
    gauge = torch.randn(a.shape[-2], a.shape[-2], generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.solve(gauge, a.double()), b.double() @ gauge


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_distance_is_that_of_the_updates(batch: tuple[int, ...]) -> None:
    first, second = factors(0, batch=batch), factors(1, batch=batch)
    found = delta_weight_distance(*first, *second)
    assert found.shape == batch and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), distance(first, second), rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
def test_it_keeps_its_precision_near_the_target(step: float) -> None:
    """Of the last of these, about 1e-6, the three traces leave nothing but their own rounding, about 3e-2."""
    (a, b), (da, db) = factors(0, 200, 300, 8), factors(1, 200, 300, 8)
    near = (a + step * da, b + step * db)
    found = delta_weight_distance(*near, a, b).double()
    # What float32 leaves of so small a change of the factors is part of the question, not of the answer.
    torch.testing.assert_close(found, distance(near, (a, b)), rtol=1e-3, atol=0)
    assert delta_weight_distance(a, b, a.clone(), b.clone()) == 0.0


def test_where_it_loses_precision() -> None:
    """One update in two gauges: what is left is rounding, relative to how far the factors are apart."""
    a, b = factors(0, 200, 300, 8)
    other_a, other_b = (x.float() for x in regauged(a, b))
    size = (b - other_b).square().sum() * a.square().sum() + b.square().sum() * (a - other_a).square().sum()
    assert abs(delta_weight_distance(a, b, other_a, other_b)) < 1e-6 * size
    exact = delta_weight_distance(a.double(), b.double(), *regauged(a, b))
    assert exact < 1e-20 * (b.double() @ a.double()).square().sum() * 1e6


def test_gradient_of_the_distance() -> None:
    first, second = factors(0), factors(1)
    leaves = [x.double().requires_grad_() for x in first]
    found = torch.autograd.grad(delta_weight_distance(*leaves, *(x.double() for x in second)), leaves)
    a, b = leaves
    expected = torch.autograd.grad((b @ a - second[1].double() @ second[0].double()).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # It is zero at the target in whatever gauge, where the loss on factors still pulls.
    moved = [x.detach().requires_grad_() for x in regauged(*first)]
    there = torch.autograd.grad(delta_weight_distance(*moved, *(x.double() for x in first)), moved)
    assert max(g.abs().max() for g in there) < 1e-8


def test_ranks_may_differ_and_half_precision_is_widened() -> None:
    first, second = factors(0, rank=3), factors(1, rank=5)
    expected = distance(first, second)
    torch.testing.assert_close(delta_weight_distance(*first, *second).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(delta_weight_distance(*second, *first).double(), expected, rtol=1e-5, atol=0)
    halves = [x.bfloat16() for x in (*first, *second)]
    assert delta_weight_distance(*halves).dtype == torch.float32


LAYOUTS: dict[str, Callable[[nn.Module], AdapterLayout]] = {
    "all linear layers": lambda base: AdapterLayout.from_lora_config(
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", alpha_pattern={"q_proj": 12}), base
    ),
    "embedding": lambda base: AdapterLayout.from_lora_config(
        LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "v_proj"], use_rslora=True), base
    ),
    "Conv1D": lambda base: AdapterLayout.from_lora_config(
        LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=2)),
    ),
    "convolution": lambda base: AdapterLayout(
        (LoraModule("a", "linear", (2, 3, 5, 5), (7, 2, 1, 1), 4.0), LoraModule("b", "linear", (2, 3), (2, 2), 1.0))
    ),
}


def adapter_of(layout: AdapterLayout, seed: int, batch: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.key: torch.randn(*batch, *t.shape, generator=generator) for t in layout.tensors}


def update(layout: AdapterLayout, module: LoraModule, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = (adapter[tensor.key].double() for tensor in module.tensors)
    return layout.scaling(module) * b.reshape(-1, module.rank) @ a.reshape(module.rank, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_module_by_module(name: str, base_model: nn.Module) -> None:
    layout = LAYOUTS[name](base_model)
    first, second = adapter_of(layout, 0), adapter_of(layout, 1)
    expected = [(update(layout, m, first) - update(layout, m, second)).square() for m in layout.modules]
    found = delta_weight_distances(first, second, layout)
    torch.testing.assert_close(found.double(), torch.stack([e.sum() for e in expected]), rtol=1e-5, atol=0)
    mse = delta_weight_mse(first, second, layout)
    assert mse.item() == pytest.approx(sum(e.mean().item() for e in expected) / len(expected), rel=1e-5)
    sizes = torch.arange(1.0, len(expected) + 1)
    relative = sum(float(e.sum()) / size for e, size in zip(expected, sizes.tolist(), strict=True)) / len(expected)
    assert delta_weight_mse(first, second, layout, sizes).item() == pytest.approx(relative, rel=1e-5)

    batches = [adapter_of(layout, seed, batch=(3,)) for seed in (0, 1)]
    each = [
        delta_weight_distances(*({k: m[i] for k, m in batch.items()} for batch in batches), layout) for i in range(3)
    ]
    torch.testing.assert_close(delta_weight_distances(*batches, layout), torch.stack(each))


def test_an_adapter_of_another_shape_is_refused(layout: AdapterLayout) -> None:
    adapter = adapter_of(layout, 0)
    key = layout.tensors[2].key
    with pytest.raises(LayoutError, match=rf"{key}.*missing"):
        delta_weight_mse({k: m for k, m in adapter.items() if k != key}, adapter, layout)
    with pytest.raises(LayoutError, match=r"has shape \(1, 1\)"):
        canonical_state_dict(layout, {**adapter, key: torch.zeros(1, 1)})


@pytest.mark.parametrize("form", [(13, 17, 4), (3, 17, 4), (13, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_canonical_factors_give_the_same_update(form: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    a, b = (x.double() for x in factors(0, *form, batch=batch))
    c, d = canonical_factors(a, b)
    assert (c.shape, d.shape) == (a.shape, b.shape)
    torch.testing.assert_close(d @ c, b @ a, rtol=1e-12, atol=1e-12)
    # Balanced, orthogonal, sorted.
    torch.testing.assert_close(c @ c.mT, d.mT @ d, rtol=0, atol=1e-12)
    norms = (d.mT @ d).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(torch.diag_embed(norms), d.mT @ d, rtol=0, atol=1e-12)
    assert (norms.diff(dim=-1) <= 1e-12).all()
    again = canonical_factors(c, d)
    torch.testing.assert_close(again[0], c, rtol=0, atol=1e-10)


def test_canonical_factors_are_the_same_in_every_gauge() -> None:
    a, b = factors(0)
    first, second = canonical_factors(a.double(), b.double()), canonical_factors(*regauged(a, b))
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    exact = b.double() @ a.double()
    c, d = canonical_factors(a, b)
    assert c.dtype == torch.float32
    assert ((d.double() @ c.double()) - exact).abs().max() < 3e-7 * exact.abs().max() * math.sqrt(4)


def test_canonical_factors_of_a_smaller_rank() -> None:
    a, b = (x.double() for x in factors(0))
    b[:, 2] = b[:, 0]  # rank 3
    c, d = canonical_factors(a, b)
    torch.testing.assert_close(d @ c, b @ a, rtol=1e-12, atol=1e-12)
    assert (c[3] == 0).all() and (d[:, 3] == 0).all() and c[2].any()
    for zero in canonical_factors(a, torch.zeros_like(b)):
        assert (zero == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_canonical_state_dict(name: str, base_model: nn.Module) -> None:
    layout = LAYOUTS[name](base_model)
    adapter = adapter_of(layout, 0)
    canonical = canonical_state_dict(layout, adapter)
    layout.check_state_dict(canonical)
    assert list(canonical) == [tensor.key for tensor in layout.tensors]
    for module in layout.modules:
        expected = update(layout, module, adapter)
        torch.testing.assert_close(
            update(layout, module, canonical), expected, rtol=0, atol=3e-6 * expected.norm().item()
        )
    assert not torch.equal(canonical[layout.tensors[0].key], adapter[layout.tensors[0].key])
    again = canonical_state_dict(layout, adapter)
    assert all(torch.equal(again[key], matrix) for key, matrix in canonical.items())
