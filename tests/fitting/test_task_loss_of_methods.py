# SPDX-License-Identifier: Apache-2.0
"""The base's own loss with generated adapters of other methods than plain LoRA in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from support.live_models import assert_untouched, snapshot
from support.methods import METHODS, SOFT, trained
from torch import nn

from peft_dnd.adapters.layouts import layout_from_config, live_tensors
from peft_dnd.adapters.method_loading import load_method_adapter
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.fitting.task_loss import TaskLoss


FreshBase = Callable[[], nn.Module]
BATCHES = [
    {
        "input_ids": torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 9, 2, 7], [-100, 3, 8, -100, -100]]),
    },
    {
        "input_ids": torch.tensor([[4, 6, 2, 1]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.int64),
        "labels": torch.tensor([[-100, 6, 2, -100]]),
    },
]


def values_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in live_tensors(model, "default").items()}


def of_peft(
    base: nn.Module, name: str, values: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The loss and its gradients, by PEFT alone."""
    layout = layout_from_config(METHODS[name], base)
    live = load_method_adapter(copy.deepcopy(base), "default", layout, values).eval()
    live.config.use_cache = False
    loss = live(**batch).loss
    loss.backward()
    return loss.item(), {key: parameter.grad for key, parameter in live_tensors(live, "default").items()}


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_peft(name: str, fresh_base: FreshBase) -> None:
    base = fresh_base()
    layout = layout_from_config(METHODS[name], base)
    before = snapshot(base)
    loss_of = TaskLoss(base, layout)
    adapters = [values_of(trained(fresh_base(), METHODS[name], seed)) for seed in (1, 2)]
    stacked = {key: torch.stack([each[key] for each in adapters]).requires_grad_() for key in adapters[0]}
    losses = loss_of.losses(stacked, BATCHES)
    (losses * torch.tensor([1.0, 3.0])).sum().backward()
    assert not loss_of.base.shares_passes
    for item, (weight, values) in enumerate(zip((1.0, 3.0), adapters, strict=True)):
        expected, gradients = of_peft(base, name, values, BATCHES[item])
        assert losses[item].item() == pytest.approx(expected, rel=1e-5)
        moved = 0
        for key, gradient in gradients.items():
            ours = stacked[key].grad
            assert ours is not None
            torch.testing.assert_close(
                ours[item],
                weight * (torch.zeros_like(ours[item]) if gradient is None else gradient),
                rtol=1e-4,
                atol=1e-6,
            )
            moved += int(ours[item].abs().max() > 0)
        assert moved, "no tensor has a gradient"
    assert_untouched(base, before)


@pytest.mark.parametrize("name", ["IA3", "prompt tuning"])
def test_an_adapter_that_is_there_is_what_it_starts_from(name: str, fresh_base: FreshBase) -> None:
    model = trained(fresh_base(), METHODS[name])
    before = snapshot(model)
    loss_of = TaskLoss(model, layout_from_config(METHODS[name], fresh_base()))
    initial, values = loss_of.initial_adapter(), values_of(model)
    assert initial.keys() == values.keys() and all(torch.equal(initial[key], values[key]) for key in values)
    assert loss_of(values, BATCHES[0]).item() == pytest.approx(model.eval()(**BATCHES[0]).loss.item(), rel=1e-5)
    assert_untouched(model, before)


def test_layers_computed_again(fresh_base: FreshBase) -> None:
    values = values_of(trained(fresh_base(), METHODS["IA3"]))
    layout = layout_from_config(METHODS["IA3"], fresh_base())
    found = []
    for checkpointing in (False, True):
        leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
        TaskLoss(fresh_base(), layout, gradient_checkpointing=checkpointing)(leaves, BATCHES[0]).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*found)
    prefix = layout_from_config(SOFT["prefix tuning"], fresh_base())
    with pytest.raises(GeneratorConfigError, match=r"PREFIX_TUNING adapter .* base_gradient_checkpointing off"):
        TaskLoss(fresh_base(), prefix, gradient_checkpointing=True)
