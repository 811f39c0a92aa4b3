# SPDX-License-Identifier: Apache-2.0
"""Bringing long prompts to a length that a cascade can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import GeneratorConfigError


class LengthProjection(nn.Module):
    """Mixes the positions of each prompt down to fewer: (B, N, L, C) -> (B, N, L', C).

    Two linear maps along L, from L to L' and from L' to L', with nothing between them. Source: the published code of
    arXiv 2506.16406, for prompts of more than a thousand tokens. It takes the states' memory, which is laid out as
    (L, C), for (C, L), so that each of its "positions" is a run of features of neighbouring tokens; `scrambled=True`
    does the same, which is what reading a released generator needs.

    Args:
        input_length: L.
        length: L'.
        scrambled: Whether to mix as the release does, rather than along L.

    Attributes:
        noise: Standard deviation of the noise added to what comes out, in training only. The release adds its noise to
            the condition here, after the projection; `DnDTrainer` sets it.
    """

    def __init__(self, input_length: int, length: int, *, scrambled: bool = False) -> None:
        super().__init__()
        self.scrambled = scrambled
        self.noise = 0.0
        self.down = nn.Linear(input_length, length)
        self.gate = nn.Linear(length, length)

    @classmethod
    def from_settings(cls, input_length: int, settings: Mapping[str, Any]) -> LengthProjection:
        """Build the projection that a decoder's settings describe.

        Args:
            input_length: L.
            settings: `{"length": L', "scrambled": false}`; `scrambled` may be left out.

        Raises:
            GeneratorConfigError: If a setting is unknown, missing or impossible.
        """
        found = dict(settings) if isinstance(settings, Mapping) else {}
        length, scrambled = found.pop("length", None), found.pop("scrambled", False)
        positive = isinstance(length, int) and not isinstance(length, bool) and length > 0
        if found or not positive or not isinstance(scrambled, bool):
            raise GeneratorConfigError(
                "length_projection must be a dictionary of length and scrambled, for instance "
                f'{{"length": 1000, "scrambled": false}}, but is {settings!r}.'
            )
        return cls(input_length, length, scrambled=scrambled)

    @property
    def length(self) -> int:
        """L', the number of positions that come out."""
        return self.down.out_features

    @property
    def settings(self) -> dict[str, Any]:
        """What [`from_settings`][LengthProjection.from_settings] builds this projection from."""
        return {"length": self.length, "scrambled": self.scrambled}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps (B, N, L, C) to (B, N, L', C)."""
        *outer, length, size = states.shape
        rows = states.reshape(*outer, size, length) if self.scrambled else states.transpose(-1, -2)
        rows = self.gate(self.down(rows))
        mixed = rows.reshape(*outer, -1, size) if self.scrambled else rows.transpose(-1, -2)
        if self.training and self.noise:
            mixed = mixed + self.noise * torch.randn_like(mixed)
        return mixed
