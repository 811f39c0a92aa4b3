# SPDX-License-Identifier: Apache-2.0
"""Files that others' tools write: GGUF bases, Text-to-LoRA's checkpoints, adapters of all methods and their cards."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hostile.fuzzing import LONG, QUICK, fuzz, read
from hostile.mutations import damaged, gguf_files, json_files, safetensors_files, yaml_files
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from support.existing_adapters import make_adapter
from support.gguf_bases import write_base
from support.text_to_lora import KINDS, write_checkpoint

from peft_dnd import AdapterLayout, GeneratedAdapter, import_adapters
from peft_dnd.cli.adapter_lists import read_adapter_list
from peft_dnd.cli.recipes import read_recipe
from peft_dnd.engines import write_gguf
from peft_dnd.engines.gguf import read_gguf_base
from peft_dnd.errors import CorruptFileError
from peft_dnd.published.text_to_lora_files import read_checkpoint


HOW = [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
METHODS = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=2, target_modules=["q_proj"], save_projection=False),
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
_numbers = count()


@pytest.fixture(scope="module")
def base_file(base_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_base(base_model, folder / "base.gguf", "llama")
    return folder


@pytest.mark.parametrize("how", HOW)
def test_a_spoiled_gguf_base(how: settings, base_file: Path, tmp_path: Path) -> None:
    fuzz(
        base_file, lambda folder: read_gguf_base(folder / "base.gguf"), {"base.gguf": gguf_files}, tmp_path / "f", how
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (gguf.GGUFValueType.UINT8, 2**63 - 1),
        (gguf.GGUFValueType.UINT8, 10**9),
        (gguf.GGUFValueType.STRING, 10**9),
        (gguf.GGUFValueType.ARRAY, 10**9),
    ],
)
def test_a_gguf_array_that_says_to_be_longer_than_its_file(kind: int, said: int, tmp_path: Path) -> None:
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"a" + (gguf.GGUFValueType.ARRAY).to_bytes(4, "little")
    (tmp_path / "base.gguf").write_bytes(header + key + kind.to_bytes(4, "little") + said.to_bytes(8, "little"))

    def refused(folder: Path) -> None:
        with pytest.raises(CorruptFileError, match="no readable GGUF"):
            read_gguf_base(folder / "base.gguf")

    read(refused, tmp_path)


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize("how", HOW)
def test_what_is_exported_is_what_the_gguf_reader_reads(how: settings, base_model: Any, tmp_path: Path) -> None:
    base_model.config.save_pretrained(tmp_path / "base")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    numbers = st.dictionaries(st.sampled_from(modules), st.integers(1, 6), max_size=3)

    @how
    @given(st.integers(1, 6), st.integers(1, 40), numbers, numbers, st.booleans(), st.sets(st.sampled_from(modules)))
    def export(rank: int, alpha: int, ranks: dict, alphas: dict, rslora: bool, targets: set[str]) -> None:
        wanted = sorted(targets | {"v_proj"})
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=wanted, **patterns)
        layout = AdapterLayout.from_lora_config(config, base_model)
        draw = torch.Generator().manual_seed(0)
        adapter = GeneratedAdapter(layout, {t.key: torch.randn(t.shape, generator=draw) for t in layout.tensors})
        write_gguf(adapter, tmp_path / "adapter.gguf", tmp_path / "base")
        reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        said = reader.fields["adapter.lora.alpha"].contents()
        assert len(found) == len(layout.tensors)
        for module in layout.modules:
            a, b = (adapter.state_dict()[tensor.key].numpy() for tensor in module.tensors)
            expected = layout.scaling(module) * b @ a
            block, part = module.name.split(".")[2], module.name.rpartition(".")[2].removesuffix("_proj")
            name = {"o": "attn_output", **dict.fromkeys("qkv")}.get(part, f"ffn_{part}") or f"attn_{part}"
            a, b = (found[f"blk.{block}.{name}.weight.lora_{side}"] for side in "ab")
            update = said / len(a) * b @ a
            if part in "qk":  # whose rows llama.cpp has in another order
                update, expected = np.sort(update, axis=0), np.sort(expected, axis=0)
            np.testing.assert_allclose(update, expected, atol=1e-4 * max(1, abs(expected).max()))

    export()


@pytest.mark.parametrize("how", HOW)
def test_a_spoiled_checkpoint_of_text_to_lora(how: settings, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "theirs", KINDS["rebuilt, z-scored"], "org/encoder")
    files = {"args.yaml": yaml_files, "adapter_config.json": json_files, "hypermod.pt": damaged}
    fuzz(tmp_path / "theirs", read_checkpoint, files, tmp_path / "spoilt", how)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"lr: 2001-99-99", b"lr: 1" + b"0" * 9000, b"\xff"])
def test_arguments_that_yaml_stumbles_on(content: bytes, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, KINDS["task loss"], None)
    (tmp_path / "args.yaml").write_bytes(content)

    def refused(folder: Path) -> None:
        with pytest.raises(CorruptFileError, match="not readable YAML"):
            read_checkpoint(folder)

    read(refused, tmp_path)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", METHODS)
def test_a_spoiled_adapter_of_another_method(
    method: str, how: settings, fresh_base: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    get_peft_model(fresh_base(), METHODS[method]).save_pretrained(tmp_path / "adapter")
    files = {"adapter_config.json": json_files, "adapter_model.safetensors": safetensors_files}
    fuzz(tmp_path / "adapter", GeneratedAdapter.from_pretrained, files, tmp_path / "spoilt", how)


@pytest.mark.parametrize("how", HOW)
def test_a_spoiled_adapter_that_is_made_a_task_of(how: settings, base_model: torch.nn.Module, tmp_path: Path) -> None:
    make_adapter(base_model, tmp_path / "adapter", 1, target_modules=["q_proj", "down_proj"])
    card = "---\ndatasets: [law]\n---\n# Law\n\nWhat the law says.\n"
    (tmp_path / "adapter" / "README.md").write_text(card)

    def take(folder: Path) -> None:
        pairs = tmp_path / f"pairs-{next(_numbers)}"
        import_adapters({"law": folder}, pairs, prompts={"law": "card"})
        assert {path.name for path in pairs.iterdir()} <= {"law", "initialization"}

    files = {"adapter_config.json": json_files, "adapter_model.safetensors": safetensors_files, "README.md": damaged}
    fuzz(tmp_path / "adapter", take, files, tmp_path / "spoilt", how)


def test_spoiled_recipes_and_lists(tmp_path: Path) -> None:
    recipe = b"base: x\noutput: y\ntasks: {law: law.jsonl}\ntraining: {max_steps: 3}\n"
    listed = b"law: {adapter: ./law, prompts: card}\ntax: {adapter: [./a, ./b], prompts: {file: p.txt, column: q}}\n"

    @QUICK
    @given(yaml_files(recipe), yaml_files(listed))
    def spoil(first: bytes, second: bytes) -> None:
        (tmp_path / "recipe.yaml").write_bytes(first)
        (tmp_path / "list.yaml").write_bytes(second)
        read(
            lambda folder: read_recipe(folder / "recipe.yaml", ["base", "output", "tasks", "training"], None), tmp_path
        )
        read(lambda folder: read_adapter_list(str(folder / "list.yaml"), "prompt", None), tmp_path)

    spoil()


def test_the_bounds_bound(tmp_path: Path) -> None:
    """A reader without an end is seen."""
    with pytest.raises((MemoryError, TimeoutError)):
        read(lambda _: bytearray(1 << 34), tmp_path)
