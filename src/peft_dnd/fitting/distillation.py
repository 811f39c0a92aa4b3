# SPDX-License-Identifier: Apache-2.0
"""The divergence of a student's next-token distributions from a teacher's, of which only the top tokens are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ..errors import LayoutError
from .adapted_base import AdaptedBase
from .rows import LABEL_PADDING, Places, stack


def top_token_divergence(logits: torch.Tensor, top_tokens: torch.Tensor, top_log_probs: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence from a teacher's distribution to a student's, position by position.

    The tokens beyond the teacher's top k count as one event, whose probability is what the k leave:

        KL = sum over the k of p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest)

    It is a lower bound of the divergence over the whole vocabulary (the log sum inequality), and zero just where the
    student gives the k tokens the teacher's probabilities. With k the vocabulary's size it is the whole divergence.

    Args:
        logits: (P, V), the student's, any floating dtype; the arithmetic is float32.
        top_tokens: (P, k) int64, the teacher's likeliest tokens, no token twice in a row.
        top_log_probs: (P, k), their log-probabilities among all V.

    Returns:
        (P,), float32, in nats.

    Raises:
        LayoutError: If the shapes do not belong together, or a token is not in the student's vocabulary.
    """
    if top_tokens.shape != top_log_probs.shape or top_tokens.dim() != 2 or len(top_tokens) != len(logits):
        raise LayoutError(
            f"Logits (P, V), top tokens and their log-probabilities (P, k) must have one P and one k, but have the "
            f"shapes {tuple(logits.shape)}, {tuple(top_tokens.shape)} and {tuple(top_log_probs.shape)}."
        )
    if top_tokens.numel() and int(top_tokens.max()) >= logits.shape[-1]:
        raise LayoutError(
            f"The teacher names token {int(top_tokens.max())}, but the student's vocabulary has {logits.shape[-1]} "
            "tokens. The teacher must be the generator's own base: have the task distilled again by it."
        )
    log_q_all = logits.float().log_softmax(-1)
    log_q = log_q_all.gather(-1, top_tokens)
    log_p = top_log_probs.float()
    return (log_p.exp() * (log_p - log_q)).sum(-1) + _of_the_rest(log_p, log_q)


def distillation_losses(
    base: AdaptedBase,
    matrices: Mapping[str, torch.Tensor],
    batches: Sequence[Mapping[str, Any]],
    *,
    answers_alone: bool = False,
) -> torch.Tensor:
    """Each item's mean divergence from what the teacher said, with its own adapter in place.

    Args:
        base: The frozen base.
        matrices: PEFT on-disk key -> (B, ...), the matrix's own shape last, any floating dtype.
        batches: B batches, as [`DistillationCollator`][peft_dnd.pairs.collator.DistillationCollator] makes them.
        answers_alone: Whether the teacher's answers count as if it had been sure of them: the cross-entropy.

    Returns:
        (B,), float32, in nats a token, with a graph to the matrices where gradients are enabled.

    Raises:
        LayoutError: If a matrix is missing, or the teacher names tokens that the base does not have.
    """
    # Logits at a place are those for the token after it.
    at = [pad(batch["labels"][:, 1:] != LABEL_PADDING, (0, 1)) for batch in batches]
    numbers, count = [], 0
    for wanted in at:
        number = torch.zeros(wanted.shape, dtype=torch.int64)
        number[wanted] = torch.arange(count, count + int(wanted.sum()))
        count += int(wanted.sum())
        numbers.append(number)
    number_at = stack(numbers, 0).to(base.device)
    if answers_alone:
        answers = [batch["labels"][:, 1:][wanted[:, :-1]] for batch, wanted in zip(batches, at, strict=True)]
        top_tokens = torch.cat(answers)[:, None].to(base.device)
        top_log_probs = torch.zeros_like(top_tokens, dtype=torch.float32)
    else:
        top_tokens, top_log_probs = (
            torch.cat([batch[name] for batch in batches]).to(base.device) for name in ("top_tokens", "top_log_probs")
        )

    def divergence(logits: torch.Tensor, places: Places) -> torch.Tensor:
        found = places.of(number_at)
        return top_token_divergence(logits, top_tokens[found], top_log_probs[found])

    read = [{name: batch[name] for name in batch if name in ("input_ids", "attention_mask")} for batch in batches]
    return base.losses(matrices, read, at, divergence)


def _of_the_rest(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    # What a distribution leaves beside its top tokens is a small difference of numbers near 1: below float32's
    # resolution there it is taken as that, which keeps the logarithm and its gradient finite.
    smallest = torch.finfo(torch.float32).eps
    p_rest, q_rest = ((1.0 - logs.exp().sum(-1)).clamp_min(smallest) for logs in (log_p, log_q))
    return p_rest * (p_rest.log() - q_rest.log())
