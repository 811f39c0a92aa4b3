# SPDX-License-Identifier: Apache-2.0
"""Where a generator starts without adapters: scales at which every module's update weighs alike."""

from __future__ import annotations

import pytest
import torch

from peft_dnd import AdapterLayout, WeightTokenizer
from peft_dnd.adapters.positions import token_positions
from peft_dnd.fitting.untrained import activation_sizes, untrained_statistics


BATCH = {"input_ids": torch.tensor([[3, 5, 9, 2], [7, 1, 4, 8]]), "labels": torch.tensor([[1, 2, 3, 4]] * 2)}


def test_sizes_are_of_what_goes_through_the_modules(fresh_base, layout: AdapterLayout):
    base_model = fresh_base()  # asked for hidden states, transformers leaves hooks in it
    hooks = sum(len(module._forward_hooks) for module in base_model.modules())
    sizes = activation_sizes(base_model, layout, [BATCH])
    assert sum(len(module._forward_hooks) for module in base_model.modules()) == hooks
    assert list(sizes) == [module.name for module in layout.modules]
    states = base_model(input_ids=BATCH["input_ids"], output_hidden_states=True).hidden_states
    into = base_model.model.layers[0].input_layernorm(states[0])
    out = base_model.model.layers[0].self_attn.q_proj(into)
    found = sizes["model.layers.0.self_attn.q_proj"]
    expected = [tensor.square().mean(-1).sqrt().median().item() for tensor in (into, out)]
    assert found == pytest.approx(tuple(expected))


def test_updates_of_unit_tokens_are_as_large_as_the_modules_own_output(
    fresh_base, layout: AdapterLayout
):  # fmt: skip
    base = fresh_base()
    with torch.no_grad():  # modules whose outputs differ by a hundred times
        base.model.layers[0].mlp.up_proj.weight.mul_(100)
    tokenizer = WeightTokenizer(layout)
    generator = torch.Generator().manual_seed(0)
    initial = {
        t.key: torch.randn(t.shape, generator=generator) * t.long_size**-0.5 * (t.side == "A") for t in layout.tensors
    }
    sizes = activation_sizes(base, layout, [BATCH])
    mean, scale = untrained_statistics(tokenizer, initial, sizes)
    grid = mean + scale[:, None, None] * torch.randn(tokenizer.grid_shape, generator=generator) * torch.tensor(
        [[[float(side == "B")]] for side in token_positions(tokenizer).sides]
    )
    adapter = tokenizer.decode(grid)
    for module in layout.modules:
        a, b = (adapter[tensor.key] for tensor in module.tensors)
        into = torch.randn(200, a.shape[1], generator=generator) * sizes[module.name][0]
        update = layout.scaling(module) * into @ a.T @ b.T
        assert update.square().mean().sqrt().item() == pytest.approx(sizes[module.name][1], rel=0.5)


def test_without_sizes_b_is_scaled_as_a_is(layout: AdapterLayout):
    tokenizer = WeightTokenizer(layout)
    initial = {tensor.key: torch.zeros(tensor.shape) for tensor in layout.tensors}
    _, scale = untrained_statistics(tokenizer, initial)
    expected = [(3.0 * layout.tensors[matrix].long_size) ** -0.5 for matrix in tokenizer.tensor_index().tolist()]
    torch.testing.assert_close(scale, torch.tensor(expected))
