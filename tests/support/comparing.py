# SPDX-License-Identifier: Apache-2.0
"""What folders and adapters hold, to be compared."""

from __future__ import annotations

from pathlib import Path

import torch

from peft_dnd import GeneratedAdapter


def bytes_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder and those below it, by their path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(one: GeneratedAdapter, other: GeneratedAdapter) -> bool:
    """Whether each tensor of one is in the other, bit for bit."""
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[key]) for key, tensor in one.state_dict().items())
