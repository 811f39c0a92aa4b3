# SPDX-License-Identifier: Apache-2.0
"""Asking a decoder for tokens, prompts of any length."""

from __future__ import annotations

import torch
from torch import nn


def read_set(decoder: nn.Module, prompts: list[torch.Tensor], places: int, length: int) -> torch.Tensor:
    """Decode prompts of their own lengths, padded with NaN to `places` prompts of `length`."""
    states = torch.full((1, places, length, 12), torch.nan)
    mask = torch.zeros(1, places, length, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        states[0, i, : len(prompt)] = prompt
        mask[0, i, : len(prompt)] = True
    with torch.no_grad():
        return decoder(states, mask)
