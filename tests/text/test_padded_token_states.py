# SPDX-License-Identifier: Apache-2.0
"""Prompts read with their padding, as a released generator was fitted with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from peft_dnd.errors import PromptError, TextEncoderError
from peft_dnd.text.padded_token_states import padded_token_states
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


PROMPTS = ["what is the law ?", "a court please", "what is the colour of the river ? " * 20]


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> SentenceTransformerTextEncoder:
    return SentenceTransformerTextEncoder.from_pretrained(encoder_folder)


@torch.no_grad()
def plain(encoder_folder: Path, length: int, window: int) -> torch.Tensor:
    """Tokenizer and network alone, with an attention that adds the lowest number to masked scores."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    network = AutoModel.from_pretrained(encoder_folder, attn_implementation="eager").eval()
    read = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = (read[name].reshape(-1, window) for name in ("input_ids", "attention_mask"))
    return network(input_ids=ids, attention_mask=mask).last_hidden_state.reshape(len(PROMPTS), length, -1)


@pytest.mark.parametrize(("length", "window"), [(24, 24), (40, 40), (120, 40)])
def test_states_of_the_padding_are_content(
    encoder: SentenceTransformerTextEncoder, encoder_folder: Path, length: int, window: int
) -> None:
    states, mask = padded_token_states(encoder, PROMPTS, length).select(torch.arange(3), length)
    assert mask.all()
    torch.testing.assert_close(states, plain(encoder_folder, length, window), rtol=1e-5, atol=1e-5)
    assert states[1, -1].abs().sum() > 0


def test_each_prompt_by_itself(encoder: SentenceTransformerTextEncoder) -> None:
    together = padded_token_states(encoder, PROMPTS, 80)
    encoder.module.train()
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(padded_token_states(encoder, [prompt], 80)[0], together[i])


def test_a_fitted_encoder_keeps_its_gradients(encoder_folder: Path) -> None:
    trainable = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, trainable=True)
    padded_token_states(trainable, PROMPTS[:1], 8).flat.sum().backward()
    assert any(parameter.grad is not None for parameter in trainable.module.parameters())


def test_what_cannot_be_read_is_named(encoder: SentenceTransformerTextEncoder) -> None:
    with pytest.raises(TextEncoderError, match="40 positions, into which a length of 60"):
        padded_token_states(encoder, PROMPTS, 60)
    with pytest.raises(PromptError, match="empty"):
        padded_token_states(encoder, [], 8)

    class Other:
        module, name_or_path, trainable = torch.nn.Linear(1, 1), "other", False

    with pytest.raises(TextEncoderError, match="'other' has no transformer"):
        padded_token_states(Other(), PROMPTS, 8)  # type: ignore[arg-type]
