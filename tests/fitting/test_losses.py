# SPDX-License-Identifier: Apache-2.0
"""Losses and noise against values worked out by hand and against direct formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support.weight_tokens import ragged_mask

from peft_dnd.errors import GeneratorConfigError, LayoutError, WeightValueError
from peft_dnd.fitting.losses import add_noise, masked_mse


def test_mse_by_hand():
    mask = ragged_mask()
    target = torch.zeros(2, 3, 2, 2)
    predicted = torch.zeros(2, 3, 2, 2)
    predicted[:, 0], predicted[:, 1], predicted[:, 2] = 1.0, 2.0, 3.0
    # Valid squares of one sample: 4 x 1, 2 x 4, 1 x 9.
    assert masked_mse(predicted, target, mask).item() == pytest.approx((4 + 8 + 9) / 7)
    # Weights 1, 2, 6 have the mean (4 x 1 + 2 x 2 + 1 x 6) / 7 = 2.
    weight = torch.tensor([1.0, 2.0, 6.0])
    assert masked_mse(predicted, target, mask, weight).item() == pytest.approx((4 * 1 + 8 * 2 + 9 * 6) / 2 / 7)
    assert masked_mse(predicted, target, mask, 100 * weight).item() == pytest.approx((4 + 16 + 54) / 14)


def test_mse_is_the_weighted_mean_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    mask = ragged_mask()
    predicted, target = torch.randn(2, 5, 3, 2, 2, generator=generator).unbind()
    weight = torch.tensor([0.5, 1.0, 3.0])
    paper = ((predicted - target) ** 2 * weight.view(1, -1, 1, 1))[mask.expand(5, -1, -1, -1)].mean()
    paper_weights_mean = (weight.view(-1, 1, 1).expand(3, 2, 2)[mask]).mean()
    torch.testing.assert_close(masked_mse(predicted, target, mask, weight), paper / paper_weights_mean)


def test_invalid_entries_reach_neither_loss_nor_gradient():
    mask = ragged_mask()
    predicted = torch.ones(2, 3, 2, 2, requires_grad=True)
    target = torch.zeros(2, 3, 2, 2).masked_fill(~mask, math.nan)
    loss = masked_mse(predicted, target, mask)
    loss.backward()
    assert loss.item() == 1.0
    assert torch.equal(predicted.grad != 0, mask.expand(2, -1, -1, -1))
    assert predicted.grad.isfinite().all()


def test_mse_takes_its_sum_in_float32():
    mask = torch.ones(40, 10, 10, dtype=torch.bool)
    predicted = torch.full((1, 40, 10, 10), 0.01, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_mse(predicted, torch.zeros(1, 40, 10, 10), mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(predicted[0, 0, 0, 0].item() ** 2, rel=1e-5)
    loss.backward()
    assert predicted.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("weight", [[1.0, math.nan, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, math.inf, 0.0]])
def test_unusable_weights_are_refused(weight):
    grids = torch.zeros(2, 3, 2, 2)
    with pytest.raises(WeightValueError, match="Token weights must be finite"):
        masked_mse(grids, grids, ragged_mask(), torch.tensor(weight))


def test_shapes_that_do_not_belong_together_are_refused():
    grids, mask = torch.zeros(2, 3, 2, 2), ragged_mask()
    for predicted, target, valid in [
        (grids, grids[:, :2], mask),
        (grids, grids, mask[:2]),
        (grids[0], grids[0], mask),
    ]:
        with pytest.raises(LayoutError, match="Predicted and target tokens must share the shape"):
            masked_mse(predicted, target, valid)
    with pytest.raises(LayoutError, match=r"token_weight must have the shape \(3,\)"):
        masked_mse(grids, grids, mask, torch.ones(2))
    with pytest.raises(WeightValueError, match="marks no entry"):
        masked_mse(grids, grids, torch.zeros_like(mask))


def test_noise():
    tensor = torch.ones(100, 100)
    torch.manual_seed(0)
    noise = add_noise(tensor, 0.5) - tensor
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(noise.mean().item()) < 0.02
    assert torch.equal(tensor, torch.ones(100, 100))
    torch.manual_seed(0)
    again = add_noise(tensor, 0.5)
    assert torch.equal(again, tensor + noise)
    assert add_noise(tensor.bfloat16(), 0.5).dtype == torch.bfloat16

    state = torch.get_rng_state()
    assert add_noise(tensor, 0.0) is tensor
    assert torch.equal(torch.get_rng_state(), state)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(GeneratorConfigError, match="standard deviation of noise"):
            add_noise(tensor, std)
