# SPDX-License-Identifier: Apache-2.0
"""A model's logits at chosen places alone: its head computes what a loss is taken on and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .row_groups import UngroupableError
from .rows import Pass


class HeadError(Exception):
    """A model's head cannot be had at chosen places alone; it says why. All logits are computed then."""


def head_of(model: nn.Module) -> nn.Linear | None:
    """The layer that makes logits of a model's last hidden states, if it is a plain one and the model names it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    # One with an adapter would have to be told which row each place belongs to.
    return head if type(head) is nn.Linear and not _reads_and_writes(model) else None


def logits_at_places(model: nn.Module, one_pass: Pass, head: nn.Linear | None) -> torch.Tensor:
    """The logits at a pass's places, (N, V), float32, with whatever adapters are in place.

    Given a head, its input is narrowed to the places; what the model does with the logits afterwards, such as scaling
    or capping, is done to those there are. Otherwise all logits are computed.

    Raises:
        HeadError: If the head is not met as was expected.
        UngroupableError: If the model does not give logits of each row and column.
    """
    row, column = one_pass.row, one_pass.places.column
    batch = dict(one_pass.batch)
    if not _reads_and_writes(model):
        batch.pop("labels", None)  # of which others make what their decoder reads
    if head is None:
        logits = _logits(model, batch)
        if logits.dim() != 3 or logits.shape[:2] != one_pass.shape:
            raise UngroupableError(f"the base gives logits of shape {tuple(logits.shape)} for {one_pass.shape}")
        return logits[row.to(logits.device), column.to(logits.device)].float()
    met: list[tuple[int, ...]] = []

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        met.append(tuple(hidden.shape[:-1]))
        if met != [one_pass.shape]:
            raise HeadError(f"the base's head meets states of shape {met} for {one_pass.shape}")
        return (hidden[row.to(hidden.device), column.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = _logits(model, batch)
    finally:
        handle.remove()
    if not met or logits.shape[:-1] != (1, len(row)):
        raise HeadError("the base does not make its logits by the head that it names")
    return logits[0].float()


def output_of(output: Any, name: str) -> torch.Tensor | None:
    """One of the tensors in what a model's forward gives, if it is there."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits = output_of(model(**batch), "logits")
    if logits is None:
        raise UngroupableError("the base's forward gives no logits")
    return logits


def _reads_and_writes(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
