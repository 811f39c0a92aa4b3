# SPDX-License-Identifier: Apache-2.0
"""Where each weight token belongs: its layer, and its module, side and chunk within the layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from .layout import LoraTensor
from .names import is_number
from .tokenizer import WeightTokenizer


@dataclass(frozen=True)
class TokenPositions:
    """The place of every token of a grid, in coordinates that a deeper model has no more of.

    Attributes:
        layers: (N_w,) layer of each token, counted from 0.
        slots: (N_w,) place of each token within its layer (module, side and chunk), counted from 0.
        matrices: (N_w,) which of the adapter's matrices each token is a chunk of, counted from 0.
        sides: (N_w,) `"A"` or `"B"`, the side of that matrix.
    """

    layers: tuple[int, ...]
    slots: tuple[int, ...]
    matrices: tuple[int, ...]
    sides: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return max(self.layers) + 1

    @property
    def num_slots(self) -> int:
        """How many places a layer has at most."""
        return max(self.slots) + 1


def token_positions(tokenizer: WeightTokenizer) -> TokenPositions:
    """Read off the layout where each of a tokenizer's tokens belongs.

    The first number in a module's path is its layer (the first one where there is none). What else the path says, the
    side (A or B) and the number of the chunk within the matrix make up the slot.

    Args:
        tokenizer: The tokenizer; only its layout and the order of its tokens matter.
    """
    tensors = tokenizer.layout.tensors
    layers: list[int] = []
    slots: list[tuple[str, str, int]] = []
    seen: dict[int, int] = {}
    for index in tokenizer.tensor_index().tolist():
        tensor = tensors[index]
        layer, rest = _parse(tensor)
        chunk = seen[index] = seen.get(index, -1) + 1
        layers.append(layer)
        slots.append((rest, tensor.side, chunk))
    sides = tuple(side for _, side, _ in slots)
    return TokenPositions(_numbered(layers), _numbered(slots), tuple(tokenizer.tensor_index().tolist()), sides)


def _parse(tensor: LoraTensor) -> tuple[int, str]:
    """A tensor's layer, and its module's path without it."""
    parts = tensor.module.split(".")
    numbers = [part for part in parts if is_number(part)]
    if not numbers:
        return 0, tensor.module
    parts.remove(numbers[0])
    return int(numbers[0]), ".".join(parts)


def _numbered(values: Iterable[Hashable]) -> tuple[int, ...]:
    order: dict[Hashable, int] = {}
    return tuple(order.setdefault(value, len(order)) for value in values)
