# SPDX-License-Identifier: Apache-2.0
"""Many adapters in one forward pass: each group of rows meets an A and a B of its own, in batched products.

PEFT's own way to mix adapters in a batch (`adapter_names`) takes one adapter after another in every layer, and no
gradient reaches matrices that are not its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..adapters.loading import MatrixSlot


class UngroupableError(Exception):
    """Rows of several items cannot be taken in one pass; it says why. Caught in here: items are taken one by one."""


_MOST_FILLING = 2
"""How many times their own number rows may become, when groups are filled up to equal sizes, before each row gets
matrices of its own instead."""


@dataclass(frozen=True)
class Grouping:
    """Which rows of a pass meet an adapter together: G groups of equal size, filled up where they are not.

    Attributes:
        items: (G,), int64: each group's item.
        taken: (G * size,), int64: the row at each place of the groups, any row where one is filled up; `None` where
            the groups follow each other as the rows do.
        places: (R,), int64: each row's place in the groups; `None` like `taken`.
    """

    items: torch.Tensor
    taken: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @classmethod
    def of(cls, item: torch.Tensor) -> Grouping:
        """The grouping of rows whose items are these, rows of one item together."""
        items, counts = torch.unique_consecutive(item, return_counts=True)
        size = int(counts.max())
        if bool((counts == size).all()):
            return cls(items)
        if len(items) * size > _MOST_FILLING * len(item):
            return cls(item)
        group = torch.repeat_interleave(torch.arange(len(items), device=item.device), counts)
        rows = torch.arange(len(item), device=item.device)
        places = group * size + rows - (counts.cumsum(0) - counts)[group]
        taken = rows.new_zeros(len(items) * size)
        taken[places] = rows
        return cls(items, taken, places)

    def pick(self, stacked: torch.Tensor) -> torch.Tensor:
        """Of matrices (B, ...), one for each item, the groups': (G, ...). What all share, (1, ...), stays as it is."""
        in_order = len(self.items) == len(stacked) and bool((self.items[1:] > self.items[:-1]).all())
        if len(stacked) == 1 or in_order:
            return stacked
        return stacked.index_select(0, self.items.to(stacked.device))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, ...) to (G, size, ...)."""
        if self.taken is not None:
            rows = rows.index_select(0, self.taken.to(rows.device))
        return rows.unflatten(0, (len(self.items), -1))

    def scatter(self, grouped: torch.Tensor) -> torch.Tensor:
        """(G, size, ...) to (R, ...)."""
        rows = grouped.flatten(0, 1)
        return rows if self.places is None else rows.index_select(0, self.places.to(rows.device))


_Update = Callable[..., torch.Tensor]
"""`(grouping, A, B, the frozen layer's output, its input)` -> output with the adapters; A and B for each group."""


class GroupedLayers:
    """A model's LoRA layers, which can be made to meet each group of rows with matrices of its own.

    Each layer then gives what its frozen layer gives plus s B A x, whatever the frozen layer is: quantised ones too.

    Args:
        slots: The places of the adapter's matrices, A before B, in the layout's order.

    Attributes:
        refusal: Why it cannot be done for this model; `None` if it can, as far as the layers tell.
    """

    def __init__(self, slots: Sequence[MatrixSlot]) -> None:
        self.refusal: str | None = None if slots else "only plain LoRA's adapters can share a pass"
        self._layers: list[Any] = [slot.layer for slot in slots[::2]]
        self._owns = [slot.parameter for slot in slots]
        self._updates: list[_Update] = []
        for layer, slot in zip(self._layers, slots[::2], strict=True):
            try:
                self._updates.append(_update_of(layer))
            except UngroupableError as error:
                self.refusal = f"{slot.key.rpartition('.lora_')[0]}: {error}"
                return

    @contextmanager
    def in_force(self, matrices: Sequence[torch.Tensor], item: torch.Tensor) -> Iterator[None]:
        """Within this context, backward passes included, each row meets its item's matrices.

        Args:
            matrices: (B, *shape) for each slot, or (1, *shape) where all items have the same.
            item: (R,), int64, rows of one item together: which of the B a row meets.
        """
        grouping = Grouping.of(item)
        picked = [
            grouping.pick(matrix).to(own.device, own.dtype) for matrix, own in zip(matrices, self._owns, strict=True)
        ]
        before = [vars(layer).get("forward") for layer in self._layers]
        try:
            for number, (layer, update) in enumerate(zip(self._layers, self._updates, strict=True)):
                a, b = picked[2 * number : 2 * number + 2]
                layer.forward = partial(_forward, layer, partial(update, grouping, a, b), len(item))
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                if own is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = own


def _forward(
    layer: LoraLayer,
    update: _Update,
    rows: int,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    result = layer.get_base_layer()(x, *args, **kwargs)
    if x.shape[0] != rows:
        raise UngroupableError(f"an adapted layer meets an input of shape {tuple(x.shape)} for {rows} rows")
    return update(result, x)


def _update_of(layer: LoraLayer) -> _Update:
    """What adds the adapters to a layer's output; see [`_Update`]."""
    (name,) = layer.active_adapters
    if name in getattr(layer, "lora_variant", {}):
        raise UngroupableError(f"{type(layer).__name__} has a variant of LoRA")
    base, scaling = layer.get_base_layer(), float(layer.scaling[name])
    if name in layer.lora_embedding_A:
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            raise UngroupableError("an embedding that renormalises its vectors or scales their gradients")
        scale = float(getattr(base, "embed_scale", 1.0))
        return partial(_add_embedding, scaling * scale, base.padding_idx)
    down, up = layer.lora_A[name], layer.lora_B[name]
    if isinstance(down, nn.modules.conv._ConvNd) and isinstance(up, nn.modules.conv._ConvNd):
        if down.padding_mode != "zeros":
            raise UngroupableError(f"a convolution with padding_mode={down.padding_mode!r}")
        return partial(_add_convolution, scaling, down, up)
    # Not its attention, for instance: what PEFT adapts by other means than adding to a layer's output.
    if type(down) is nn.Linear and type(up) is nn.Linear and not isinstance(base, nn.MultiheadAttention):
        return partial(_add_linear, scaling)
    raise UngroupableError(f"{type(layer).__name__} around {type(base).__name__} is of no kind that can be grouped")


def _add_linear(
    scaling: float, grouping: Grouping, a: torch.Tensor, b: torch.Tensor, result: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    x = x.to(a.dtype)
    groups = len(grouping.items)
    if len(a) == 1:  # one product for all rows
        low = grouping.gather(nn.functional.linear(x, a[0])).reshape(groups, -1, a.shape[1])
    else:
        low = torch.bmm(grouping.gather(x).reshape(groups, -1, a.shape[2]), a.mT)
    b = b.expand(groups, -1, -1)
    if grouping.taken is None and result.dtype == low.dtype:
        added = torch.baddbmm(result.reshape(groups, -1, result.shape[-1]), low, b.mT, alpha=scaling)
        return added.reshape(result.shape)
    update = torch.bmm(scaling * low, b.mT).unflatten(1, (-1, *x.shape[1:-1]))  # low is the smaller one to scale
    return (result + grouping.scatter(update)).to(result.dtype)


def _add_embedding(
    scaling: float,
    padding: int | None,
    grouping: Grouping,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    groups = len(grouping.items)
    a, b = a.expand(groups, -1, -1), b.expand(groups, -1, -1)
    tokens = grouping.gather(x)
    low = a[torch.arange(groups, device=a.device)[:, None], :, tokens.flatten(1)]
    if padding is not None:  # as nn.Embedding, which gives padding no gradient
        low = torch.where((tokens.flatten(1) == padding)[..., None], low.detach(), low)
    update = torch.bmm(low, b.mT).unflatten(1, tokens.shape[1:])
    return (result + scaling * grouping.scatter(update)).to(result.dtype)


def _add_convolution(
    scaling: float,
    down: nn.modules.conv._ConvNd,
    up: nn.modules.conv._ConvNd,
    grouping: Grouping,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    # Groups side by side as channels: a grouped convolution gives each of them its own weights.
    groups = len(grouping.items)
    beside = grouping.gather(x.to(a.dtype)).transpose(0, 1).flatten(1, 2)
    for module, weight in ((down, a), (up, b)):
        convolve: Any = getattr(nn.functional, f"conv{weight.dim() - 3}d")
        settings = (module.stride, module.padding, module.dilation)
        each = weight.expand(groups, *[-1] * (weight.dim() - 1)).flatten(0, 1)
        beside = convolve(beside, each, None, *settings, groups)
    update = grouping.scatter(beside.unflatten(1, (groups, -1)).transpose(0, 1))
    return (result + scaling * update).to(result.dtype)
