# SPDX-License-Identifier: Apache-2.0
"""Adapters that exist already, for the tests of importing them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.existing_adapters import make_adapter
from torch import nn


Make = Callable[..., Path]
FORMS: dict[str, dict[str, Any]] = {
    "law": {"r": 2, "lora_alpha": 16},
    "tax": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "med": {"r": 4, "lora_alpha": 32, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
}


@pytest.fixture
def make(base_model: nn.Module, tmp_path: Path) -> Make:
    """Makes an adapter in a folder of its own."""
    return lambda name, seed=0, **options: make_adapter(base_model, tmp_path / "loras" / name, seed, **options)


@pytest.fixture
def three(make: Make) -> dict[str, Path]:
    """Three adapters of other ranks, alphas and scalings."""
    return {task: make(task, seed, **form) for seed, (task, form) in enumerate(FORMS.items())}
