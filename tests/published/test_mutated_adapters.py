# SPDX-License-Identifier: Apache-2.0
"""Adapters damaged in every way that was thought of: refused, or read as PEFT reads them, and never silently wrong."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.existing_adapters import (
    CONFIG,
    WEIGHTS,
    make_adapter,
    reconfigure,
    rewrite,
    updates_of,
    updates_of_task,
)
from support.released import save
from torch import nn

from peft_dnd import ExistingAdapter, import_adapters
from peft_dnd.errors import CorruptFileError, LayoutError, PeftDndError, WeightValueError


Matrices = dict[str, torch.Tensor]
START = "base_model.model.model.layers."
Q, K, OUT, UP = (
    f"{START}1.{name}.lora_" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
)
_numbers = count()


@pytest.fixture(scope="module")
def sound(base_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the same base in which all is well, and which adapts all that the other does."""
    return make_adapter(base_model, tmp_path_factory.mktemp("sound"), 1, target_modules=TARGETS)


@pytest.fixture
def hurt(base_model: nn.Module, tmp_path: Path) -> Path:
    """An adapter that is to be damaged."""
    return make_adapter(base_model, tmp_path / "hurt", 2, target_modules=TARGETS)


TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj"]


def read(sound: Path, hurt: Path, adapter: ExistingAdapter | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """What becomes of the damaged adapter's updates, with every leniency that there is."""
    pairs = hurt.parent / f"pairs-{next(_numbers)}"
    given = {"sound": sound, "hurt": adapter or hurt}
    prompts = {"sound": ["law ?"], "hurt": ["tax ?"]}
    import_adapters(given, pairs, prompts=prompts, missing_modules="zeros", factors="canonical", **options)
    return updates_of_task(pairs / "hurt")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], update, rtol=0, atol=1e-5 * update.abs().max().item())
        for name, update in expected.items()
    )


def exchange(one: str, other: str) -> Callable[[Matrices], None]:
    def change(state: Matrices) -> None:
        state[one], state[other] = state[other], state[one]

    return change


def rename(old: str, new: str) -> Callable[[Matrices], Matrices]:
    return lambda state: {key.replace(old, new): matrix for key, matrix in state.items()}


def put(key: str, value: float, where: tuple[int, int] = (0, 0)) -> Callable[[Matrices], None]:
    def change(state: Matrices) -> None:
        state[key][where] = value

    return change


WEIGHT_MUTATIONS: dict[str, tuple[Callable[[Matrices], Any], type[PeftDndError], str]] = {
    "A and B exchanged": (exchange(f"{UP}A.weight", f"{UP}B.weight"), LayoutError, "no LoRA pair|rank"),
    "A transposed": (lambda s: s.update({f"{Q}A.weight": s[f"{Q}A.weight"].T}), LayoutError, "no LoRA pair|rank"),
    "modules exchanged": (exchange(f"{K}B.weight", f"{UP}B.weight"), LayoutError, "different base models"),
    "a matrix dropped": (lambda s: {k: m for k, m in s.items() if k != f"{Q}B.weight"}, LayoutError, "partner"),
    "a module dropped": (lambda s: {k: m for k, m in s.items() if Q not in k}, LayoutError, "incomplete"),
    "a layer dropped": (lambda s: {k: m for k, m in s.items() if f"{START}1" not in k}, LayoutError, "incomplete"),
    "all dropped": (lambda s: {"x": torch.ones(1)}, LayoutError, "no LoRA matrix"),
    "a module renamed": (rename(Q, Q.replace("q_proj", "q_prj")), LayoutError, "does not target"),
    "a layer renamed": (rename(f"{START}1", f"{START}7"), LayoutError, "incomplete|lacks"),
    "a key renamed": (rename(f"{Q}A", f"{Q}C"), LayoutError, "no LoRA matrix"),
    "a prefix renamed": (rename("base_model.model.model.layers.1", "base_model.mode.layers.1"), LayoutError, "lacks"),
    "a matrix twice": (
        lambda s: s.update({f"module.{Q}A.weight": s[f"{Q}A.weight"].clone()}),
        LayoutError,
        "one matrix",
    ),
    "two adapters": (
        lambda s: s.update({k.replace(".weight", ".other.weight"): m.clone() for k, m in list(s.items())}),
        LayoutError,
        "more than one adapter",
    ),
    "a strange matrix": (lambda s: s.update({"lm_head.weight": torch.ones(2, 2)}), LayoutError, "no LoRA matrix"),
    "magnitudes of DoRA": (
        lambda s: s.update({f"{Q}magnitude_vector": torch.ones(24)}),
        LayoutError,
        "no LoRA matrix",
    ),
    "NaN": (put(f"{Q}A.weight", torch.nan), WeightValueError, "NaN"),
    "infinity": (put(f"{Q}B.weight", -torch.inf), WeightValueError, "infinite"),
    "an exponent's bit": (put(f"{Q}A.weight", 1e30), WeightValueError, "damaged"),
    "whole numbers": (lambda s: {k: (100 * m).char() for k, m in s.items()}, WeightValueError, "floating-point"),
    "all zero": (lambda s: {k: torch.zeros_like(m) for k, m in s.items()}, WeightValueError, "changes nothing"),
    "B zero": (
        lambda s: {k: torch.zeros_like(m) if "lora_B" in k else m for k, m in s.items()},
        WeightValueError,
        "changes nothing",
    ),
    "rank cut": (
        lambda s: {k: m[:2] if "lora_A" in k else m[:, :2] for k, m in s.items()},
        LayoutError,
        "has rank 2 .* says 3",
    ),
    "other base's sizes": (
        lambda s: {k: m.repeat(1, 2) if "lora_A" in k else m.repeat(2, 1) for k, m in s.items()},
        LayoutError,
        "different base models",
    ),
}


@pytest.mark.parametrize("mutation", WEIGHT_MUTATIONS)
def test_damaged_weights_are_refused(mutation: str, sound: Path, hurt: Path) -> None:
    change, error, words = WEIGHT_MUTATIONS[mutation]
    rewrite(hurt, change)
    with pytest.raises(error, match=words):
        read(sound, hurt)


CONFIG_MUTATIONS: dict[str, dict[str, Any]] = {
    "no rank": {"r": ...},
    "no alpha": {"lora_alpha": ...},
    "alpha of zero": {"lora_alpha": 0},
    "alpha negative": {"lora_alpha": -6},
    "alpha a text": {"lora_alpha": "6"},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha huge": {"lora_alpha": 10**400},
    "alpha of a module": {"alpha_pattern": {"q_proj": None}},
    "rank": {"r": 4},
    "rank of a module": {"rank_pattern": {"q_proj": 2}},
    "rsLoRA a text": {"use_rslora": "false"},
    "rsLoRA misspelt": {"use_rslora": ..., "use_rslore": True},
    "another method": {"peft_type": "LOHA"},
    "no method": {"peft_type": ...},
    "DoRA": {"use_dora": True},
    "trained biases": {"bias": "lora_only"},
    "trained modules": {"modules_to_save": ["lm_head"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "another target": {"target_modules": ["q_proj", "k_proj", "up_proj"]},
    "one target more": {"target_modules": [*TARGETS, "down_proj"], "layers_to_transform": [1]},
    "another base": {"base_model_name_or_path": "org/base-2"},
    "another task type": {"task_type": "SEQ_2_SEQ_LM"},
    "a task type that is none": {"task_type": "CAUSAL"},
    "targets a number": {"target_modules": 7},
}


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_damaged_configurations_are_refused(mutation: str, sound: Path, hurt: Path) -> None:
    reconfigure(hurt, **CONFIG_MUTATIONS[mutation])
    with pytest.raises(PeftDndError):
        read(sound, hurt)


def test_another_alpha_is_another_update(sound: Path, hurt: Path) -> None:
    before = read(sound, hurt)
    reconfigure(hurt, lora_alpha=12)
    assert same(read(sound, hurt), {name: 2 * update for name, update in before.items()})
    reconfigure(hurt, alpha_pattern={"q_proj": 3})
    after = read(sound, hurt)
    for name, update in before.items():
        factor = 0.5 if name.endswith("q_proj") else 2
        torch.testing.assert_close(after[name], factor * update, rtol=0, atol=1e-5)


def test_truncated_files_are_refused(sound: Path, hurt: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        content = (hurt / name).read_bytes()
        for length in (0, 1, 7, 8, 9, len(content) // 3, len(content) // 2, len(content) - 2):
            (hurt / name).write_bytes(content[:length])
            with pytest.raises(CorruptFileError):
                read(sound, hurt)
        (hurt / name).write_bytes(content)
    save(load_file(hurt / WEIGHTS), hurt / "adapter_model.bin")
    (hurt / WEIGHTS).unlink()
    content = (hurt / "adapter_model.bin").read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 30):
        (hurt / "adapter_model.bin").write_bytes(content[:length])
        with pytest.raises(CorruptFileError):
            read(sound, hurt, pickles=True)


def flipped(content: bytes, places: range, number: int, seed: int) -> list[bytes]:
    """Copies of a file with one bit of one byte flipped, at places drawn from a seed."""
    draw = random.Random(seed)
    copies = []
    for place in draw.sample(places, min(number, len(places))):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(7)
        copies.append(bytes(changed))
    return copies


def test_a_flipped_bit_is_refused_or_read_as_peft_reads_it(sound: Path, hurt: Path) -> None:
    digests = {name: hashlib.sha256((hurt / name).read_bytes()).hexdigest() for name in (WEIGHTS, CONFIG)}
    weights, config = ((hurt / name).read_bytes() for name in (WEIGHTS, CONFIG))
    header = 8 + int.from_bytes(weights[:8], "little")
    cases = [(CONFIG, flipped(config, range(len(config)), 50, 0)), (WEIGHTS, flipped(weights, range(header), 50, 1))]
    cases.append((WEIGHTS, flipped(weights, range(header, len(weights)), 12, 2)))
    known = ExistingAdapter(hurt, sha256=digests[WEIGHTS], config_sha256=digests[CONFIG])
    refused = 0
    for name, copies in cases:
        content = (hurt / name).read_bytes()
        for number, changed in enumerate(copies):
            (hurt / name).write_bytes(changed)
            try:
                found = read(sound, hurt)
            except PeftDndError:
                refused += 1
            else:
                config_now = json.loads((hurt / CONFIG).read_text())
                assert config_now["lora_alpha"] > 0
                assert same(found, updates_of(hurt)), f"flip {number} of {name}"
            with pytest.raises(CorruptFileError, match="SHA-256"):
                read(sound, hurt, known)
        (hurt / name).write_bytes(content)
    assert refused > 60
    assert same(read(sound, hurt, known), updates_of(hurt))


def test_matrices_of_one_shape_that_were_exchanged_show_in_the_digest_alone(sound: Path, hurt: Path) -> None:
    known = ExistingAdapter(hurt, sha256=hashlib.sha256((hurt / WEIGHTS).read_bytes()).hexdigest())
    rewrite(hurt, exchange(f"{Q}A.weight", f"{OUT}A.weight"))
    assert same(read(sound, hurt), updates_of(hurt))
    with pytest.raises(CorruptFileError, match="SHA-256"):
        read(sound, hurt, known)
