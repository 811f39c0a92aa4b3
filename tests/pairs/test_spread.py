# SPDX-License-Identifier: Apache-2.0
"""The spread of weight tokens, taken checkpoint by checkpoint, against the formula on all of them at once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.weight_tokens import ragged_mask

from peft_dnd.errors import GeneratorConfigError
from peft_dnd.fitting.losses import masked_mse
from peft_dnd.pairs.spread import TokenSpread, spread_of_grids


def checkpoints(offset: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 0.1, 5.0]).view(1, 3, 1, 1)
    grids = {}
    for task, count in [("law", 4), ("med", 7), ("one", 2)]:
        grids[task] = offset + scale * torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return grids


def spread_over(stacks: dict[str, torch.Tensor], mask: torch.Tensor) -> TokenSpread:
    return spread_of_grids(((task, grid) for task, stack in stacks.items() for grid in stack), mask)


def direct_spread(stack: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published formula: entry-wise deviation over its mean over valid entries, averaged in each token."""
    deviation = stack.std(dim=0, correction=0).masked_fill(~mask, math.nan)
    return (deviation / deviation.nanmean()).nanmean(dim=(1, 2))


# The offset is where a sum of squares in place of Welford's recurrence would lose all digits.
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_streaming_equals_direct(offset):
    mask, grids = ragged_mask(), checkpoints(offset)
    junk = {task: stack.masked_fill(~mask, math.nan) for task, stack in grids.items()}
    spread = spread_over(junk, mask)
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
    spread = spread_over(checkpoints(), mask)
    for kind in ("within_task", "between_task"):
        for floor in (0.0, 0.01, 0.5, 100.0):
            weight = spread.weights(kind, floor)
            assert weight.dtype == torch.float32
            assert weight.view(-1, 1, 1).expand_as(mask)[mask].mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(spread.weights("within_task", floor=0.0), spread.within_task.float())


def test_a_constant_token_keeps_the_floor():
    grids = torch.tensor([[1.0, 0.1], [3.0, 0.1]]).view(2, 2, 1, 1)
    weight = spread_over({"law": grids}, torch.ones(2, 1, 1, dtype=torch.bool)).weights("within_task", floor=0.5)
    assert weight.tolist() == pytest.approx([2.0 / 1.25, 0.5 / 1.25])


def test_what_never_varies_gets_equal_weights():
    spread = spread_over({"only": torch.randn(1, 3, 2, 2)}, ragged_mask())
    for kind in ("within_task", "between_task"):
        assert torch.equal(spread.weights(kind), torch.ones(3))


def test_a_token_without_weights_has_no_part():
    mask = ragged_mask()
    mask[1] = False
    spread = spread_over(checkpoints(), mask)
    assert spread.within_task[1] == 0
    assert spread.within_task.isfinite().all()
    grids = torch.ones(1, 3, 2, 2)
    assert masked_mse(grids, 0 * grids, mask, spread.weights("within_task")).item() == pytest.approx(1.0)


def test_another_kind_is_refused():
    with pytest.raises(GeneratorConfigError, match="Unknown kind of spread 'both'"):
        spread_over(checkpoints(), ragged_mask()).weights("both")
