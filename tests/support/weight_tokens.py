# SPDX-License-Identifier: Apache-2.0
"""A mask of weight tokens of which not every entry is valid."""

from __future__ import annotations

import torch


def ragged_mask() -> torch.Tensor:
    """Three tokens of 2 x 2 entries, of which 4, 2 and 1 are valid."""
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    mask[1, 1] = False
    mask[2, :, 1] = False
    mask[2, 1] = False
    return mask
