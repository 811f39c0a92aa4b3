# SPDX-License-Identifier: Apache-2.0
"""The states of a pool of prompts: what they say of themselves, cut, stacked, pooled; and what is refused."""

from __future__ import annotations

import pytest
import torch

from peft_dnd.errors import GeneratorConfigError, TextEncoderError
from peft_dnd.text.token_states import TokenStates


@pytest.fixture
def states() -> TokenStates:
    """Prompts of 2, 4, 1 tokens of width 3, numbered through."""
    return TokenStates(torch.arange(1.0, 22.0).view(7, 3), torch.tensor([0, 2, 6, 7]))


class TestTokenStates:
    def test_describes_itself(self, states):
        assert len(states) == 3
        assert states.embedding_size == 3
        assert states.lengths.tolist() == [2, 4, 1]
        assert states[1].tolist() == states.flat[2:6].tolist()
        assert torch.equal(states[-1], states[2])
        with pytest.raises(IndexError):
            states[3]

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
    def test_cut_leaves_what_select_would(self, states, length):
        cut = states.cut(length)
        assert cut.lengths.tolist() == [min(n, length) for n in (2, 4, 1)]
        for number in range(3):
            assert torch.equal(cut[number], states[number][:length])
        assert (cut is states) == (length >= 4)

    def test_select_pads_cuts_and_repeats(self, states):
        selected, mask = states.select(torch.tensor([2, 1, 0, 1]), max_length=3)
        assert selected.shape == (4, 3, 3)
        assert mask.tolist() == [[True, False, False], [True] * 3, [True, True, False], [True] * 3]
        assert torch.equal(selected[1], states[1][:3])
        assert torch.equal(selected[3], states[1][:3])
        assert torch.equal(selected[2][:2], states[0])
        assert torch.equal(selected[0][0], states[2][0])
        assert selected[~mask].abs().max() == 0

    def test_select_has_one_length_whatever_is_chosen(self, states):
        selected, mask = states.select(torch.tensor([0]), max_length=9)
        assert selected.shape == (1, 9, 3)
        assert mask.sum() == 2

    def test_select_equals_a_loop(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 12, (30,), generator=generator)
        states = TokenStates.from_list([torch.randn(int(n), 5, generator=generator) for n in lengths])
        indices = torch.randint(0, 30, (64,), generator=generator)
        selected, mask = states.select(indices, max_length=7)
        for row, index in enumerate(indices.tolist()):
            kept = states[index][:7]
            assert torch.equal(selected[row, : len(kept)], kept)
            assert mask[row].sum() == len(kept)
            assert not selected[row, len(kept) :].any()

    def test_garbage_in_other_prompts_does_not_leak(self, states):
        flat = states.flat.clone()
        flat[2:6] = float("nan")
        selected, _ = TokenStates(flat, states.offsets).select(torch.tensor([0, 2]), max_length=4)
        assert torch.isfinite(selected).all()

    def test_gradients_reach_exactly_the_selected_tokens(self, states):
        flat = states.flat.clone().requires_grad_(True)
        selected, _ = TokenStates(flat, states.offsets).select(torch.tensor([1, 1]), max_length=3)
        selected.sum().backward()
        assert flat.grad[:, 0].tolist() == [0, 0, 2, 2, 2, 0, 0]

    def test_half_precision_is_given_as_float32(self, states):
        half = TokenStates(states.flat.half(), states.offsets)
        selected, _ = half.select(torch.tensor([0]), max_length=2)
        assert half.flat.dtype == torch.float16
        assert selected.dtype == torch.float32
        assert torch.equal(selected[0], states[0])

    def test_mean_is_over_tokens_only(self, states):
        assert torch.allclose(states.mean(), torch.stack([states[i].mean(dim=0) for i in range(3)]))

    def test_vectors_are_states_of_one_token(self):
        vectors = torch.randn(4, 6)
        states = TokenStates.from_vectors(vectors)
        selected, mask = states.select(torch.arange(4), max_length=1)
        assert torch.equal(selected[:, 0], vectors)
        assert mask.all()
        assert torch.equal(states.mean(), vectors)

    @pytest.mark.parametrize("indices", [[3], [-1], [0, 99]])
    def test_select_refuses_indices_out_of_range(self, states, indices):
        with pytest.raises(IndexError, match="from 0 to 2"):
            states.select(torch.tensor(indices), max_length=2)

    def test_select_refuses_no_length(self, states):
        with pytest.raises(GeneratorConfigError, match="max_length"):
            states.select(torch.tensor([0]), max_length=0)

    @pytest.mark.parametrize(
        ("flat", "offsets", "message"),
        [
            (torch.zeros(7), torch.tensor([0, 7]), r"shape \(total_tokens, C\)"),
            (torch.zeros(7, 3, dtype=torch.int64), torch.tensor([0, 7]), "floating point"),
            (torch.zeros(7, 3), torch.tensor([0, 6]), "rise from 0 to 7"),
            (torch.zeros(7, 3), torch.tensor([1, 7]), "rise from 0 to 7"),
            (torch.zeros(7, 3), torch.tensor([0, 5, 4, 7]), "rise from 0 to 7"),
            (torch.zeros(7, 3), torch.tensor([0]), r"shape \(n \+ 1,\)"),
            (torch.zeros(7, 3), torch.tensor([0.0, 7.0]), "int64"),
        ],
    )
    def test_refuses_what_is_no_ragged_store(self, flat, offsets, message):
        with pytest.raises(TextEncoderError, match=message):
            TokenStates(flat, offsets)
