# SPDX-License-Identifier: Apache-2.0
"""Tensors read straight from safetensors files are what safetensors itself reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_dnd.storage.stored_weights import stored_tensors


def test_stored_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(7, 3, 2),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = stored_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())
    assert torch.equal(found["matrix"].read((2, 5)), tensors["matrix"][2:5])
    assert torch.equal(found["matrix"].read((0, 1)), tensors["matrix"][:1])
