# SPDX-License-Identifier: Apache-2.0
"""GGUF adapters read back with the `gguf` reader: names, scaling, order of rows, and what is refused."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from peft_dnd import AdapterLayout, GeneratedAdapter
from peft_dnd.engines import write_gguf
from peft_dnd.errors import BaseModelMismatchError, CorruptFileError, EngineError, LayoutError


def adapter_for(model: nn.Module, config: LoraConfig) -> GeneratedAdapter:
    layout = AdapterLayout.from_lora_config(config, model)
    generator = torch.Generator().manual_seed(0)
    return GeneratedAdapter(layout, {t.key: torch.randn(t.shape, generator=generator) for t in layout.tensors})


@pytest.fixture
def adapter(base_model: nn.Module, lora_config: LoraConfig) -> GeneratedAdapter:
    return adapter_for(base_model, lora_config)


@pytest.fixture
def base_folder(base_model: nn.Module, tmp_path: Path) -> Path:
    base_model.config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def read(file: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def update_of(adapter: GeneratedAdapter, name: str) -> torch.Tensor:
    module = next(module for module in adapter.layout.modules if module.name == name)
    matrix_a, matrix_b = (adapter.state_dict()[tensor.key] for tensor in module.tensors)
    return adapter.layout.scaling(module) * matrix_b @ matrix_a


def test_what_llama_cpp_reads(adapter, base_folder, tmp_path) -> None:
    write_gguf(adapter, tmp_path / "adapter.gguf", base_folder)
    fields, tensors = read(tmp_path / "adapter.gguf")
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{block}.{part}.weight.lora_{side}" for block in (0, 1) for part in parts for side in "ab"}
    assert tensors.keys() == expected and {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    update = tensors["blk.1.ffn_down.weight.lora_b"] @ tensors["blk.1.ffn_down.weight.lora_a"] * (6 / 3)
    assert np.allclose(update, update_of(adapter, "model.layers.1.mlp.down_proj"), atol=1e-5)


def test_rows_of_q_and_k_are_in_llama_cpps_order(adapter, base_folder, tmp_path) -> None:
    write_gguf(adapter, tmp_path / "adapter.gguf", base_folder)
    _, tensors = read(tmp_path / "adapter.gguf")
    for part, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        there = tensors[f"blk.0.{part}.weight.lora_b"] @ tensors[f"blk.0.{part}.weight.lora_a"] * 2
        here = update_of(adapter, f"model.layers.0.self_attn.{name}").numpy()
        size = len(here) // heads
        for head in range(heads):
            rows = [head * size + place for pair in range(size // 2) for place in (pair, pair + size // 2)]
            assert np.allclose(there[head * size : (head + 1) * size], here[rows], atol=1e-5)


def test_scalings_that_llama_cpp_does_not_know_go_into_b(base_model, base_folder, tmp_path) -> None:
    uneven = LoraConfig(
        r=2,
        lora_alpha=8,
        rank_pattern={"up_proj": 4},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
        target_modules=["up_proj", "v_proj", "o_proj", "down_proj"],
    )
    adapter = adapter_for(base_model, uneven)
    write_gguf(adapter, tmp_path / "adapter.gguf", base_folder)
    fields, tensors = read(tmp_path / "adapter.gguf")
    for part, name in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")):
        matrix_a, matrix_b = (tensors[f"blk.1.{part}.weight.lora_{side}"] for side in "ab")
        scaling = fields["adapter.lora.alpha"] / len(matrix_a)
        assert np.allclose(scaling * matrix_b @ matrix_a, update_of(adapter, f"model.layers.1.{name}"), atol=1e-4)


def test_an_architecture_whose_rows_stay(tmp_path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    adapter = adapter_for(Gemma3ForCausalLM(config), LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    config.save_pretrained(tmp_path / "base")
    write_gguf(adapter, tmp_path / "adapter.gguf", tmp_path / "base")
    fields, tensors = read(tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == "gemma3"
    update = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    assert np.allclose(update, update_of(adapter, "model.layers.0.self_attn.q_proj"), atol=1e-5)


def base_file(path: Path, shapes: dict[str, tuple[int, ...]], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_base_that_is_a_file_is_held_against_the_adapter(base_model, base_folder, tmp_path) -> None:
    adapter = adapter_for(base_model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    shapes = {
        f"blk.{block}.{part}.weight": (rows, 24) for block in (0, 1) for part, rows in (("attn_q", 24), ("attn_v", 12))
    }
    write_gguf(adapter, tmp_path / "from-file.gguf", base_file(tmp_path / "base.gguf", shapes))
    write_gguf(adapter, tmp_path / "from-config.gguf", base_folder)
    assert (tmp_path / "from-file.gguf").read_bytes() == (tmp_path / "from-config.gguf").read_bytes()
    wide = {**shapes, "blk.1.attn_v.weight": (24, 24)}
    few = {name: shape for name, shape in shapes.items() if name != "blk.0.attn_q.weight"}
    for number, (wrong, words) in enumerate(((wide, r"blk\.1\.attn_v\.weight.*24, 24"), (few, r"no 'blk\.0\.attn_q"))):
        with pytest.raises(BaseModelMismatchError, match=words):
            write_gguf(adapter, tmp_path / "no.gguf", base_file(tmp_path / f"{number}.gguf", wrong))
    assert not (tmp_path / "no.gguf").exists()


def test_what_is_refused(adapter, base_model, base_folder, tmp_path, monkeypatch) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    config.save_pretrained(tmp_path / "gpt2")
    of_gpt2 = adapter_for(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(EngineError, match=r"'gpt2'.*gemma3, llama"):
        write_gguf(of_gpt2, tmp_path / "no.gguf", tmp_path / "gpt2")
    with pytest.raises(EngineError, match="no base model at 'nowhere'"):
        write_gguf(adapter, tmp_path / "no.gguf", "nowhere")
    shallow = copy.deepcopy(base_model.config)
    shallow.num_hidden_layers = 1
    shallow.save_pretrained(tmp_path / "shallow")
    with pytest.raises(BaseModelMismatchError, match=r"1 layers has nothing for module 'model\.layers\.1"):
        write_gguf(adapter, tmp_path / "no.gguf", tmp_path / "shallow")
    embedding = adapter_for(base_model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(LayoutError, match="embed_tokens"):
        write_gguf(embedding, tmp_path / "no.gguf", base_folder)
    whole = base_file(tmp_path / "whole.gguf", {}).read_bytes()
    for content in (b"", b"GGUF", b"no GGUF" * 9, whole[:40], b"GGUF" + b"\xff" * 60):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"bad\.gguf"):
            write_gguf(adapter, tmp_path / "no.gguf", tmp_path / "bad.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EngineError, match="pip install gguf"):
        write_gguf(adapter, tmp_path / "no.gguf", base_folder)
    assert not list(tmp_path.glob("no.gguf*")) and not list(tmp_path.glob(".peft*"))


def test_llama_cpps_name_for_a_model_of_another_name(adapter, base_folder, tmp_path) -> None:
    config = (base_folder / "config.json").read_text(encoding="utf-8")
    (base_folder / "config.json").write_text(config.replace('"llama"', '"mistral"'), encoding="utf-8")
    with pytest.raises(EngineError, match="llama for Mistral"):
        write_gguf(adapter, tmp_path / "adapter.gguf", base_folder)
    write_gguf(adapter, tmp_path / "adapter.gguf", base_folder, architecture="llama")
    assert read(tmp_path / "adapter.gguf")[0]["general.architecture"] == "llama"


def test_names_of_a_vision_language_class(adapter, base_model, base_folder, tmp_path) -> None:
    modules = tuple(
        replace(module, name=module.name.replace("model.", "model.language_model."))
        for module in adapter.layout.modules
    )
    layout = replace(adapter.layout, modules=modules)
    keys = zip(layout.tensors, adapter.layout.tensors, strict=True)
    inside = GeneratedAdapter(layout, {new.key: adapter.state_dict()[old.key] for new, old in keys})
    write_gguf(adapter, tmp_path / "a.gguf", base_folder)
    write_gguf(inside, tmp_path / "b.gguf", base_folder)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
