# SPDX-License-Identifier: Apache-2.0
"""The spread of weight tokens, taken checkpoint by checkpoint, against the formula on all of them at once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from peft_dnd.errors import GeneratorConfigError, LayoutError, WeightValueError
from peft_dnd.fitting.losses import masked_mse
from peft_dnd.pairs.spread import SpreadAccumulator


def ragged_mask() -> torch.Tensor:
    """Three tokens of 2 x 2 entries, of which 4, 2 and 1 are valid."""
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    mask[1, 1] = False
    mask[2, :, 1] = False
    mask[2, 1] = False
    return mask


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
