# SPDX-License-Identifier: Apache-2.0
"""Prompts read as the release of arXiv 2506.16406 reads them: padding and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TextEncoderError
from .encoder import TextEncoder
from .prompts import check_prompts
from .token_states import TokenStates


def padded_token_states(encoder: TextEncoder, prompts: Sequence[str], length: int) -> TokenStates:
    """The states of just `length` tokens of each prompt, cut or padded to that, those of the padding included.

    The published code pads every prompt to one length and hands what the encoder writes at the padding to the decoder
    as content, so that a released generator has to be given it. A prompt longer than the encoder has positions is cut
    into windows of that size, which do not see one another; only the first has the special token at its beginning. A
    window that is padding throughout attends to all of itself alike, as in the transformers version of the release.

    Each prompt goes through the encoder by itself, so a frozen encoder's states of it do not depend on the others.

    Args:
        encoder: A text encoder whose `module` is a sentence-transformers model that begins with a transformer.
        prompts: The prompts.
        length: L, a multiple of the encoder's number of positions if it is larger than that.

    Returns:
        Token states of L rows a prompt, `float32`, on the encoder's device.

    Raises:
        PromptTypeError: If the prompts are no sequence of strings.
        PromptError: If there are no prompts, or empty ones.
        TextEncoderError: If the encoder has no transformer and tokenizer of its own, or no windows of that length.
    """
    checked = check_prompts(prompts)
    transformer, tokenizer = _parts(encoder)
    positions = getattr(transformer.config, "max_position_embeddings", None) or length
    window = min(length, positions)
    if length % window:
        raise TextEncoderError(
            f"The text encoder {encoder.name_or_path!r} has {positions} positions, into which a length of {length} "
            f"cannot be cut evenly. Set max_prompt_length to a multiple of {positions}, or to less than that."
        )
    features = tokenizer(list(checked), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    device = next(transformer.parameters()).device
    rows = []
    with (
        torch.set_grad_enabled(encoder.trainable and torch.is_grad_enabled()),
        torch.autocast(device.type, enabled=encoder.trainable and torch.is_autocast_enabled(device.type)),
    ):
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
            states = _states(transformer, ids.to(device).view(-1, window), mask.to(device).view(-1, window))
            rows.append(states.flatten(0, 1).float())
    return TokenStates.from_list(rows)


def _states(transformer: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        transformer.eval()  # a `train()` on a parent module may have undone it
    # Added to the scores, the lowest number of all leaves a row that is masked throughout with equal weights. A mask
    # of truth values would leave it with none, or NaN, as the attention at hand decides.
    dtype = next(transformer.parameters()).dtype
    lowest = torch.finfo(dtype).min
    scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, lowest)
    wide = scores[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    states: torch.Tensor = transformer(input_ids=ids, attention_mask=wide).last_hidden_state
    return states


def _parts(encoder: TextEncoder) -> tuple[Any, Any]:
    module: Any = encoder.module
    first = module[0] if isinstance(module, nn.Sequential) else None
    transformer, tokenizer = getattr(first, "auto_model", None), getattr(first, "tokenizer", None)
    if transformer is None or tokenizer is None:
        raise TextEncoderError(
            f"The text encoder {encoder.name_or_path!r} has no transformer with a tokenizer of its own, whose padded "
            "states a released generator reads. Use the one that it was fitted with: the release uses "
            '"sentence-transformers/all-MiniLM-L12-v2".'
        )
    return transformer, tokenizer
