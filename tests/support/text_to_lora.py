# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in Text-to-LoRA's format, built from its description, and what that project's formulas make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .released import save


LAYERS, RANK, LATENT, HEAD, WIDTH = 2, 3, 16, 12, 16
# Not in the order of the modules, and of widths that are no multiples of one another.
SIZES = {"v_proj": (24, 12), "q_proj": (24, 24), "down_proj": (40, 24)}
KINDS: dict[str, dict[str, Any]] = {
    "task loss": {"training_task": "sft"},
    "task loss, biases": {"training_task": "sft", "bias": True},
    "shared head": {"training_task": "sft", "shared_AB_head": True},
    "rebuilt, z-scored": {"training_task": "recon", "pred_z_score": True, "factorized": True},
    "rebuilt, factorized": {"training_task": "recon", "pred_z_score": False, "factorized": True, "bias": True},
    "rebuilt products": {
        "training_task": "recon",
        "factorized": False,
        "delta_w_scaling": 400,
        "shared_AB_head": True,
    },
    "rank by rank": {"training_task": "sft", "autoreg_gen": True},
    "rank by rank, learned": {"training_task": "sft", "autoreg_gen": True, "learnable_pos_emb": True},
    "rank by rank, shared": {"training_task": "sft", "autoreg_gen": True, "shared_AB_head": True},
    "rank by rank, learned, shared": {
        "training_task": "sft",
        "autoreg_gen": True,
        "learnable_pos_emb": True,
        "shared_AB_head": True,
    },
}


def random_state(kind: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A state dict with all keys that a checkpoint has."""
    draw = torch.Generator().manual_seed(seed)
    size, state = LATENT, {}

    def add(name: str, *shape: int, scale: float = 0.5) -> None:
        state[name] = torch.randn(shape, generator=draw) * scale

    def linear(name: str, inside: int, outside: int, bias: bool = True) -> None:
        add(f"{name}.weight", outside, inside, scale=inside**-0.5)
        if bias:
            add(f"{name}.bias", outside)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    for target in ("AB_offset", "mean_recon_target", "std_recon_target"):
        for module, (inside, outside) in SIZES.items():
            add(f"{target}.A.{module}", LAYERS, RANK, inside)
            add(f"{target}.B.{module}", LAYERS, outside, RANK)
    for name in [name for name in state if name.startswith("std")]:
        state[name].abs_()
    if kind["training_task"] == "recon":
        for name in [name for name in state if name.startswith("AB")]:
            state[name].zero_()
    linear("task_encoder.mlp.0", WIDTH, size // 2)
    norm("task_encoder.mlp.1", size // 2)
    for name, count in (("layer_depth_encoder", LAYERS), ("layer_type_encoder", len(SIZES))):
        add(f"{name}.0.weight", count, size // 4)
        norm(f"{name}.1", size // 4)
    linear("mixer.1", size, 4 * size)
    linear("mixer.4", 4 * size, size)
    for name in ("mlp1.mlp", "mlp2.mlp", "mlp3"):
        norm(f"{name}.0", size)
        linear(f"{name}.1", size, 4 * size)
        linear(f"{name}.4", 4 * size, HEAD if name == "mlp3" else size)
    if kind.get("learnable_pos_emb"):
        add("pos_emb.0.weight", RANK, size)
        norm("pos_emb.1", size)
    if kind.get("shared_AB_head"):
        for module in SIZES:
            for side in "AB":
                add(f"out_emb.{module}.{side}", size)
        norm("out_emb_norm", size)
    for module, sizes in SIZES.items():
        width = max(sizes) if kind.get("shared_AB_head") else sum(sizes)
        linear(f"heads.{module}", HEAD, width * (1 if kind.get("autoreg_gen") else RANK), bool(kind.get("bias")))
    return state


def write_checkpoint(folder: Path, kind: dict[str, Any], encoder: str | None, seed: int = 0) -> dict[str, Tensor]:
    """Write the three files of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(kind, seed)
    save(state, folder / "hypermod.pt")
    given = {"emb_model": encoder, "encoder_type": "linear", "autoreg_gen": False, "shared_AB_head": False, **kind}
    lines = [f"{name}: {json.dumps(value)}" for name, value in given.items() if name != "bias"]
    (folder / "args.yaml").write_text(
        "\n".join([*lines, "lr: 2.5e-05", "use_one_hot_task_emb: false"]), encoding="utf-8"
    )
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": RANK,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": sorted(SIZES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    return state


def reference(state: dict[str, Tensor], kind: dict[str, Any], task: Tensor) -> dict[tuple[int, str, str], Tensor]:
    """What the published code writes of a task vector, from its formulas: (layer, module, side) -> matrix."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def layers(name: str, x: Tensor) -> Tensor:
        return F.silu(linear(f"{name}.4", F.silu(linear(f"{name}.1", x))))

    def residual(name: str, x: Tensor) -> Tensor:
        return x + layers(name, norm(f"{name}.0", x))

    def at_rank(x: Tensor, rank: int) -> Tensor:
        if kind.get("learnable_pos_emb"):
            place = norm("pos_emb.1", state["pos_emb.0.weight"][rank])
            if kind.get("shared_AB_head"):
                return x + residual("mlp2.mlp", place)
            return residual("mlp2.mlp", x + place)
        half = LATENT // 2
        angles = [rank / 10000 ** (2 * i / LATENT) for i in range(half)]
        turned = torch.empty_like(x)
        for i, angle in enumerate(map(torch.tensor, angles)):
            turned[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
            turned[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
        return residual("mlp2.mlp", turned)

    def written(module: str, x: Tensor) -> Tensor:
        """(r, what there is of each rank); or all of it in one row."""
        if kind.get("autoreg_gen"):
            rows = [linear(f"heads.{module}", layers("mlp3", norm("mlp3.0", at_rank(x, r)))) for r in range(RANK)]
            return torch.stack(rows)
        return linear(f"heads.{module}", layers("mlp3", norm("mlp3.0", x)))

    found = {}
    encoded = norm("task_encoder.mlp.1", linear("task_encoder.mlp.0", task))
    for layer in range(LAYERS):
        for number, (module, (inside, outside)) in enumerate(SIZES.items()):
            depth = norm("layer_depth_encoder.1", state["layer_depth_encoder.0.weight"][layer])
            which = norm("layer_type_encoder.1", state["layer_type_encoder.0.weight"][number])
            x = layers("mixer", torch.cat([encoded, depth, which]))
            x = residual("mlp1.mlp", x)
            if kind.get("shared_AB_head"):
                a, b = (
                    written(
                        module, residual("mlp2.mlp", x + norm("out_emb_norm", state[f"out_emb.{module}.{side}"]))
                    ).reshape(RANK, -1)[:, :size]
                    for side, size in (("A", inside), ("B", outside))
                )
            elif kind.get("autoreg_gen"):
                a, b = written(module, x).split([inside, outside], dim=-1)
            else:
                flat = written(module, residual("mlp2.mlp", x))
                a, b = flat[: RANK * inside].reshape(RANK, inside), flat[RANK * inside :].reshape(RANK, outside)
            for side, matrix in (("A", a), ("B", b.T)):
                key = f"{side}.{module}"
                if kind["training_task"] == "sft":
                    matrix = matrix + state[f"AB_offset.{key}"][layer]
                elif not kind["factorized"]:
                    matrix = matrix / kind["delta_w_scaling"] ** 0.5
                elif kind["pred_z_score"]:
                    spread = state[f"std_recon_target.{key}"][layer] + 1e-10
                    matrix = matrix * spread + state[f"mean_recon_target.{key}"][layer]
                found[layer, module, side] = matrix
    return found
