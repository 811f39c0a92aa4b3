# SPDX-License-Identifier: Apache-2.0
"""Adapters as other people leave them: of any rank and alpha, under other keys, and what they do to a base."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn


BASE = "org/base"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPTS = {"law": ["what is law ?", "a court please"], "tax": ["tax ?"], "med": ["what is medicine ?"]}


def make_adapter(base: nn.Module, folder: Path, seed: int = 0, *, card: str | None = None, **lora: Any) -> Path:
    """An adapter with random A and B, as stock PEFT saves it, that names `BASE` as its base."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **settings))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the matrices of an adapter's file: `change` may work in place or return others."""
    matrices = load_file(folder / WEIGHTS)
    changed = change(matrices) or matrices
    # In another file's place, not into it: older safetensors leave what they have loaded in the file.
    save_file({key: matrix.contiguous() for key, matrix in changed.items()}, folder / "changed")
    (folder / "changed").replace(folder / WEIGHTS)


def reconfigure(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's configuration; those given as `...` are taken out."""
    config = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def updates(config: Mapping[str, Any], matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module -> s B A, by the definition of LoRA alone: what PEFT would add to the base's weights."""
    found = {}
    for key, a in matrices.items():
        if not key.endswith(".lora_A.weight"):
            continue
        b = matrices[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = [v for k, v in config.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({k})", name)]
        alpha = alphas[0] if alphas else config["lora_alpha"]
        scaling = alpha / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
        found[name] = scaling * b.double() @ a.double()
    return found


def updates_of(folder: Path) -> dict[str, torch.Tensor]:
    """The updates of an adapter's folder."""
    return updates(json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS))


def updates_of_task(folder: Path, step: int = 1) -> dict[str, torch.Tensor]:
    """The updates of one of a task's checkpoints."""
    config = json.loads((folder / CONFIG).read_text())
    return updates(config, load_file(folder / "checkpoints" / f"step-{step:08d}.safetensors"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Make sure that the updates are the same up to rounding."""
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=1e-6 * update.abs().max().item())
