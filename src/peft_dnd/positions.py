# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From a layout's module names to the places of its weight tokens: layer, module, side and chunk."""

from __future__ import annotations

from collections.abc import Hashable

from .decoders import TokenPositions
from .layout import LoraTensor
from .tokenizer import WeightTokenizer


def token_positions(tokenizer: WeightTokenizer) -> TokenPositions:
    """Read off the layout where each of a tokenizer's tokens belongs.

    The first number in a module's path is its layer (the first one where there is none). What else the path says, the
    side (A or B) and the number of the chunk within the matrix make up the slot.

    Args:
        tokenizer: The tokenizer; only its layout and the order of its tokens matter.
    """
    tensors = tokenizer.layout.tensors
    layers: list[int] = []
    slots: list[Hashable] = []
    seen: dict[int, int] = {}
    for index in tokenizer.tensor_index().tolist():
        tensor = tensors[index]
        layer, rest = _parse(tensor)
        chunk = seen[index] = seen.get(index, -1) + 1
        layers.append(layer)
        slots.append((rest, tensor.side, chunk))
    return TokenPositions(_numbered(layers), _numbered(slots))


def _parse(tensor: LoraTensor) -> tuple[int, str]:
    """A tensor's layer, and its module's path without it."""
    parts = tensor.module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = int(parts[numbers[0]]) if numbers else 0
    rest = [part for i, part in enumerate(parts) if not numbers or i != numbers[0]]
    return layer, ".".join(rest)


def _numbered(values: list[int] | list[Hashable]) -> tuple[int, ...]:
    order: dict[Hashable, int] = {}
    return tuple(order.setdefault(value, len(order)) for value in values)
