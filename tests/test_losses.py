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
"""Losses, noise and token weights against values worked out by hand and against direct formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from peft_dnd.errors import GeneratorConfigError, LayoutError, WeightValueError
from peft_dnd.losses import SpreadAccumulator, add_noise, masked_mse


def ragged_mask() -> torch.Tensor:
    """Three tokens of 2 x 2 entries, of which 4, 2 and 1 are valid."""
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    mask[1, 1] = False
    mask[2, :, 1] = False
    mask[2, 1] = False
    return mask


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
    noise = add_noise(tensor, 0.5, torch.Generator().manual_seed(0)) - tensor
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(noise.mean().item()) < 0.02
    assert torch.equal(tensor, torch.ones(100, 100))
    again = add_noise(tensor, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(again, tensor + noise)
    assert add_noise(tensor.bfloat16(), 0.5).dtype == torch.bfloat16

    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert add_noise(tensor, 0.0, generator) is tensor
    assert torch.equal(generator.get_state(), state)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(GeneratorConfigError, match="standard deviation of noise"):
            add_noise(tensor, std)


def checkpoints(offset: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 0.1, 5.0]).view(1, 3, 1, 1)
    grids = {}
    for task, count in [("law", 4), ("med", 7), ("one", 2)]:
        grids[task] = offset + scale * torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return grids


def accumulate(grids: dict[str, torch.Tensor], mask: torch.Tensor) -> SpreadAccumulator:
    accumulator = SpreadAccumulator(mask)
    for task, stack in grids.items():
        for grid in stack:
            accumulator.update(task, grid)
    return accumulator


def direct_spread(stack: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published formula: entry-wise deviation over its mean over valid entries, averaged in each token."""
    deviation = stack.std(dim=0, correction=0).masked_fill(~mask, math.nan)
    return (deviation / deviation.nanmean()).nanmean(dim=(1, 2))


# The offset is where a sum of squares in place of Welford's recurrence would lose all digits.
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_streaming_equals_direct(offset):
    mask, grids = ragged_mask(), checkpoints(offset)
    junk = {task: stack.masked_fill(~mask, math.nan) for task, stack in grids.items()}
    spread = accumulate(junk, mask).result()
    within = torch.stack([direct_spread(stack, mask) for stack in grids.values()]).mean(dim=0)
    between = direct_spread(torch.stack([stack.mean(dim=0) for stack in grids.values()]), mask)
    torch.testing.assert_close(spread.within_task, within, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(spread.between_task, between, rtol=1e-6, atol=1e-9)
    assert (spread.num_tasks, spread.num_checkpoints) == (3, 13)
    assert spread.entries_per_token.tolist() == [4, 2, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spread.num_tasks = 4


def test_weights_have_a_mean_of_one_over_valid_entries():
    mask = ragged_mask()
    spread = accumulate(checkpoints(), mask).result()
    for kind in ("within_task", "between_task"):
        for floor in (0.0, 0.01, 0.5, 100.0):
            weight = spread.weights(kind, floor)
            assert weight.dtype == torch.float32
            assert weight.view(-1, 1, 1).expand_as(mask)[mask].mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(spread.weights("within_task", floor=0.0), spread.within_task.float())


def test_a_constant_token_keeps_the_floor():
    mask = torch.ones(2, 1, 1, dtype=torch.bool)
    accumulator = SpreadAccumulator(mask)
    for value in (1.0, 3.0):
        accumulator.update("law", torch.tensor([value, 0.1]).view(2, 1, 1))
    weight = accumulator.result().weights("within_task", floor=0.5)
    assert weight.tolist() == pytest.approx([2.0 / 1.25, 0.5 / 1.25])


def test_what_never_varies_gets_equal_weights():
    mask = ragged_mask()
    accumulator = SpreadAccumulator(mask)
    accumulator.update("only", torch.randn(3, 2, 2))
    spread = accumulator.result()
    for kind in ("within_task", "between_task"):
        assert torch.equal(spread.weights(kind), torch.ones(3))


def test_a_token_without_weights_has_no_part():
    mask = ragged_mask()
    mask[1] = False
    spread = accumulate(checkpoints(), mask).result()
    assert spread.within_task[1] == 0
    assert spread.within_task.isfinite().all()
    grids = torch.ones(1, 3, 2, 2)
    assert masked_mse(grids, 0 * grids, mask, spread.weights("within_task")).item() == pytest.approx(1.0)


def test_wrong_checkpoints_are_refused():
    mask = ragged_mask()
    accumulator = SpreadAccumulator(mask)
    with pytest.raises(WeightValueError, match="No checkpoint was given"):
        accumulator.result()
    with pytest.raises(LayoutError, match=r"'law' has a token grid of \(2, 2, 2\)"):
        accumulator.update("law", torch.zeros(2, 2, 2))
    with pytest.raises(WeightValueError, match="'law' holds NaN"):
        accumulator.update("law", torch.full((3, 2, 2), math.nan))
    accumulator.update("law", torch.zeros(3, 2, 2))
    accumulator.update("med", torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="'law' must come one after another"):
        accumulator.update("law", torch.zeros(3, 2, 2))
    with pytest.raises(LayoutError, match="valid mask must be"):
        SpreadAccumulator(mask[0])
    with pytest.raises(WeightValueError, match="marks no entry"):
        SpreadAccumulator(torch.zeros_like(mask))
    spread = accumulator.result()
    with pytest.raises(GeneratorConfigError, match="Unknown kind of spread 'both'"):
        spread.weights("both")
    with pytest.raises(GeneratorConfigError, match="floor of token weights"):
        spread.weights("within_task", -1.0)
