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


@dataclass(frozen=True)
class Grouping:
    """Which adapter each row of a pass meets.

    Attributes:
        item: (R,), int64: each row's item; rows of one item stand together.
        items: The items that occur, in the order of their rows.
        even: Whether each of them has as many rows, so that the rows need no adapter each.
    """

    item: torch.Tensor
    items: torch.Tensor
    even: bool

    @classmethod
    def of(cls, item: torch.Tensor) -> Grouping:
        """The grouping of rows whose items are these."""
        items, counts = torch.unique_consecutive(item, return_counts=True)
        return cls(item, items, bool((counts == counts[0]).all()))

    def pick(self, stacked: torch.Tensor) -> torch.Tensor:
        """Of matrices (B, ...) one for each group, (G, ...): a group is an item, or a row where they are uneven."""
        index = (self.items if self.even else self.item).to(stacked.device)
        if len(index) == len(stacked) and self.even and bool((self.items[1:] > self.items[:-1]).all()):
            return stacked  # all items, in their order
        return stacked.index_select(0, index)


class GroupedLayers:
    """A model's LoRA layers, which can be made to meet each group of rows with matrices of its own.

    Each layer then gives what its frozen layer gives plus s B A x, whatever the frozen layer is: quantised ones too.

    Args:
        slots: The places of the adapter's matrices, A before B, in the layout's order.

    Attributes:
        refusal: Why it cannot be done for this model; `None` if it can, as far as the layers tell.
    """

    def __init__(self, slots: Sequence[MatrixSlot]) -> None:
        self._layers: list[Any] = [slot.layer for slot in slots[::2]]
        self._owns = [slot.parameter for slot in slots]
        self._updates: list[Callable[..., torch.Tensor]] = []
        self.refusal: str | None = None
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
            matrices: (B, *shape) for each slot.
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
                layer.forward = partial(_forward, layer, partial(update, a, b), len(item))
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                if own is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = own


def _forward(
    layer: LoraLayer,
    update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: int,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    result = layer.get_base_layer()(x, *args, **kwargs)
    if x.shape[0] != rows:
        raise UngroupableError(f"an adapted layer meets an input of shape {tuple(x.shape)} for {rows} rows")
    return update(result, x)


def _update_of(layer: LoraLayer) -> Callable[..., torch.Tensor]:
    """A function `(A, B, the frozen layer's output, its input)` -> output with the adapters; A, B for each group."""
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
    scaling: float, a: torch.Tensor, b: torch.Tensor, result: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    groups = len(a)
    low = torch.bmm(x.to(a.dtype).reshape(groups, -1, x.shape[-1]), a.mT)
    grouped = result.reshape(groups, -1, result.shape[-1])
    if result.dtype == low.dtype:
        added = torch.baddbmm(grouped, low, b.mT, alpha=scaling)
    else:
        added = (grouped + torch.bmm(scaling * low, b.mT)).to(result.dtype)  # low is the smaller one to scale
    return added.reshape(result.shape)


def _add_embedding(
    scaling: float,
    padding: int | None,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    groups = len(a)
    tokens = x.reshape(groups, -1)
    low = a[torch.arange(groups, device=a.device)[:, None], :, tokens]
    if padding is not None:  # as nn.Embedding, which gives padding no gradient
        low = torch.where((tokens == padding)[..., None], low.detach(), low)
    added = result.reshape(groups, -1, result.shape[-1]) + scaling * torch.bmm(low, b.mT)
    return added.reshape(result.shape).to(result.dtype)


def _add_convolution(
    scaling: float,
    down: nn.modules.conv._ConvNd,
    up: nn.modules.conv._ConvNd,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    # Groups side by side as channels: a grouped convolution gives each of them its own weights.
    groups, rows = len(a), len(x) // len(a)
    beside = x.to(a.dtype).unflatten(0, (groups, rows)).transpose(0, 1).flatten(1, 2)
    for module, weight in ((down, a), (up, b)):
        convolve: Any = getattr(nn.functional, f"conv{weight.dim() - 3}d")
        settings = (module.stride, module.padding, module.dilation)
        beside = convolve(beside, weight.flatten(0, 1), None, *settings, groups)
    update = beside.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return (result + scaling * update).to(result.dtype)
