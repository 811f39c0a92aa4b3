# SPDX-License-Identifier: Apache-2.0
"""Losses of many adapters in one pass, by a head that computes the answers' tokens and a draw of the others.

A quarter of a million tokens cost more than all layers of a small base. The loss is a sampled softmax: the batch's
own target tokens, and others drawn anew for each step, which stand for all that were not drawn (Jean et al. 2015,
arXiv 1412.2007).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from language_model.rows import Row, batch_of
from peft_dnd import AdapterLayout
from peft_dnd.fitting.adapted_base import AdaptedBase
from peft_dnd.fitting.rows import LABEL_PADDING, Places


class SampledHeadBase:
    """A base with adapters of which losses alone are wanted.

    Args:
        model: The base; it is not touched, and its weights are shared.
        layout: Of the adapters.
        others: How many tokens are drawn beside the targets; the loss is that of the full softmax where there are no
            more.
        tokens_per_pass: As for `AdaptedBase`.
    """

    def __init__(
        self, model: nn.Module, layout: AdapterLayout, *, others: int = 2000, tokens_per_pass: int = 2048
    ) -> None:
        weight = model.get_output_embeddings().weight  # type: ignore[operator]
        self._all = weight.detach()
        self._others = others
        narrowed = with_head(model, weight[: 2 * others])
        self.base = AdaptedBase(narrowed, layout, tokens_per_pass=tokens_per_pass)
        self._head = self.base.model.get_output_embeddings()  # type: ignore[operator]

    @property
    def layout(self) -> AdapterLayout:
        return self.base.layout

    def losses(self, matrices: Mapping[str, torch.Tensor], rows: Sequence[Sequence[Row]], seed: int) -> torch.Tensor:
        """Each adapter's mean loss over the labelled tokens of its own rows, (B,), with a graph to the matrices.

        Args:
            matrices: Key -> (B, *shape).
            rows: For each adapter its rows: `input_ids` and `labels`, lists of the same length.
            seed: Of the draw of other tokens.
        """
        batches = [batch_of(some) for some in rows]
        at = [F.pad(batch["labels"][:, 1:], (0, 1), value=LABEL_PADDING) != LABEL_PADDING for batch in batches]
        wanted = [batch["labels"][:, 1:][here[:, :-1]] for batch, here in zip(batches, at, strict=True)]
        targets = torch.cat(wanted).unique()
        drawn = self._draw(targets, seed)
        self._head.weight.data = self._all[torch.cat([targets, drawn]).to(self._all.device)].float()
        place = torch.full((len(self._all),), -1)
        place[targets] = torch.arange(len(targets))
        width = max(batch["labels"].shape[1] for batch in batches)
        height = max(batch["labels"].shape[0] for batch in batches)
        labels = torch.full((len(batches), height, width), -1)
        for number, batch in enumerate(batches):
            given = batch["labels"]
            labels[number, : given.shape[0], : given.shape[1]] = place[given.clamp_min(0)]
        # Each token that was drawn stands for so many that were not.
        weight = math.log((len(self._all) - len(targets)) / len(drawn)) if len(drawn) else 0.0

        def position_loss(logits: torch.Tensor, places: Places) -> torch.Tensor:
            shift = torch.zeros(logits.shape[-1], device=logits.device)
            shift[len(targets) :] = weight
            chosen = Places(places.item.cpu(), places.row.cpu(), places.column.cpu()).of(labels, 1)
            return F.cross_entropy(logits + shift, chosen.to(logits.device), reduction="none")

        return self.base.losses(matrices, batches, at, position_loss)

    def _draw(self, targets: torch.Tensor, seed: int) -> torch.Tensor:
        free = torch.ones(len(self._all), dtype=torch.bool)
        free[targets] = False
        rest = free.nonzero()[:, 0]
        return rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: self._others]]


def with_head(model: nn.Module, weight: torch.Tensor | None = None) -> nn.Module:
    """The same base, its weights shared, with a head that computes in float32 whatever the base's precision is.

    Some processors are ten times slower at this product in bfloat16.

    Args:
        model: The base; it is not touched.
        weight: The head's, (tokens, width); `None`: the base's own.
    """
    own = model.get_output_embeddings().weight  # type: ignore[operator]
    weight = own if weight is None else weight
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    copied: Any = copy.deepcopy(model, shared)
    head = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    head.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(_in_float32)
    copied.set_output_embeddings(head)
    return copied


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])
