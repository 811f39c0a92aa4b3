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
"""Where in an adapter a weight token belongs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenPositions:
    """The place of every token of a grid, in coordinates that a deeper model has no more of.

    Attributes:
        layers: (N_w,) layer of each token, counted from 0.
        slots: (N_w,) place of each token within its layer (module, side and chunk), counted from 0.
    """

    layers: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return max(self.layers) + 1

    @property
    def num_slots(self) -> int:
        """How many places a layer has at most."""
        return max(self.slots) + 1
