# SPDX-License-Identifier: Apache-2.0
"""`inspect`: what a thing is, whether it fits a base, in what it differs, what vLLM would pass over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_dnd import write_task_without_checkpoints
from peft_dnd.adapters.layout import AdapterLayout


pytest_plugins = ("support.several_bases",)


@pytest.fixture
def adapter(generator, tmp_path: Path) -> Path:
    generator.generate_adapter(["what is the law ?"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_a_generator(run, generator, generator_folder) -> None:
    ran = run("inspect", generator_folder, "--json")
    assert ran.code == 0, ran.err
    layout: AdapterLayout = generator.config.adapter_layout
    facts = ran.facts
    assert facts["kind"] == "generator" and facts["problems"] == []
    assert facts["adapter_parameters"] == layout.num_parameters and facts["ranks"] == {"3": len(layout.modules)}
    assert facts["num_prompts"] == 4 and facts["module_kinds"]["q_proj"] == 2
    assert facts["weights_bytes"] == (generator_folder / "model.safetensors").stat().st_size
    words = run("inspect", generator_folder).out
    assert "max rank: 3" in words and f"adapter parameters: {layout.num_parameters:,}" in words


def test_an_adapter_and_where_it_came_from(run, adapter) -> None:
    facts = run("inspect", adapter, "--json").facts
    assert facts["kind"] == "adapter" and facts["provenance"]["seed"] == 0 and facts["max_rank"] == 3


def test_a_pairs_folder(run, pairs_folder, tmp_path) -> None:
    facts = run("inspect", pairs_folder, "--json").facts
    assert facts["kind"] == "pairs" and facts["tasks"]["law"]["checkpoints"] == 3
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    record = json.loads((folder / "med" / "task.json").read_text(encoding="utf-8"))
    (folder / "med" / "task.json").write_text(json.dumps({**record, "complete": False}), encoding="utf-8")
    changed(folder / "law", lora_alpha=99)
    ran = run("inspect", folder, "--json")
    assert ran.code == 1
    assert any("'med' is incomplete" in problem for problem in ran.facts["problems"])
    assert any("alpha" in problem and "'law'" in problem for problem in ran.facts["problems"])


def test_a_base_against_a_generator(run, generator_folder, base_folder, tmp_path) -> None:
    ran = run("inspect", generator_folder, "--base", base_folder, "--json")
    assert ran.code == 0 and ran.facts["fits_base"] is True
    small = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, config, words in (
        ("wide", LlamaConfig(hidden_size=32, intermediate_size=40, **small), "shape_b"),
        ("flat", LlamaConfig(hidden_size=24, intermediate_size=40, **{**small, "num_hidden_layers": 1}), "layers.1"),
    ):
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / name)
        ran = run("inspect", generator_folder, "--base", tmp_path / name, "--json")
        assert ran.code == 1 and ran.facts["fits_base"] is False and words in ran.facts["problems"][0]
    ran = run("inspect", generator_folder, "--base", tmp_path / "typo")
    assert ran.code == 1 and "typo" in ran.err


def test_the_first_difference(run, generator_folder, adapter, collected) -> None:
    assert run("inspect", generator_folder, "--against", adapter, "--json").facts["difference"] is None
    assert "same layout: yes" in run("inspect", generator_folder, "--against", adapter).out
    ran = run("inspect", generator_folder, "--against", collected, "--json")
    assert ran.code == 1 and "rank 3 in the first and 2 in the second" in ran.facts["difference"]


def test_where_there_is_no_layout_nothing_passes_for_compared(
    run, generator_folder, base_folder, pairs_folder, folder, tmp_path
) -> None:
    write_task_without_checkpoints(tmp_path / "pairs" / "law", ["what is the law ?"], [{"input_ids": [1]}])
    assert run("inspect", tmp_path / "pairs").code == 0
    for option, other in (("--base", base_folder), ("--against", generator_folder), ("--for", "vllm")):
        ran = run("inspect", tmp_path / "pairs", option, other, "--json")
        assert ran.code == 1 and "no adapters in it" in ran.facts["problems"][0]
    ran = run("inspect", generator_folder, "--against", tmp_path / "pairs", "--json")
    assert ran.code == 1 and "it has no layout" in ran.facts["difference"]
    ran = run("inspect", generator_folder, "--against", folder, "--json")
    assert ran.code == 1 and "it has 3 bases: say by --base" in ran.facts["difference"]
    ran = run("inspect", pairs_folder / "law")
    assert ran.code == 1 and "is the folder of one task" in ran.err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "ignore rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "ignore alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "does not take modules_to_save"),
        ({"base_model_name_or_path": "other/base"}, "passes over it without a word"),
        ({"r": 32}, "limit of 16"),
    ],
)
def test_vllm_is_not_let_be_silently_wrong(run, adapter, values, words) -> None:
    changed(adapter, base_model_name_or_path="org/base")
    good = run("inspect", adapter, "--for", "vllm", "--served", "org/base")
    assert good.code == 0 and "taken by vllm: yes" in good.out
    changed(adapter, **values)
    ran = run("inspect", adapter, "--for", "vllm", "--served", "org/base", "--json")
    assert ran.code == 1 and any(words in problem for problem in ran.facts["problems"])
    assert ran.facts["taken_by_vllm"] is False


def test_vllm_and_a_generator_of_several_ranks(run, fresh_base, generator_folder, tmp_path) -> None:
    assert run("inspect", generator_folder, "--for", "vllm").code == 0
    config = LoraConfig(r=2, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"])
    get_peft_model(fresh_base(), config).save_pretrained(tmp_path / "several")
    ran = run("inspect", tmp_path / "several", "--for", "vllm", "--json")
    assert ran.code == 1 and ran.facts["ranks"] == {"2": 2, "4": 2} and "rank_pattern" in ran.facts["problems"][0]


def test_vllm_and_names_of_another_class(run, adapter, base_folder, tmp_path) -> None:
    assert run("inspect", adapter, "--base", base_folder, "--for", "vllm").code == 0
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(base_folder)
    model.model.save_pretrained(tmp_path / "bare")
    ran = run("inspect", adapter, "--base", tmp_path / "bare", "--for", "vllm", "--json")
    assert ran.code == 1 and ran.facts["fits_base"] is True
    assert "other names in the served model" in ran.facts["problems"][0]


@pytest.mark.parametrize(
    ("told", "left_out"),
    [
        (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 0),
        (["q_proj", "o_proj", "up_proj", "down_proj"], 0),  # vLLM adapts what it has fused with these as well
        (["q_proj", "o_proj", "down_proj"], 4),
        (["q_proj", "gate_proj", "model.layers.1.mlp.down_proj"], 3),
    ],
)
def test_modules_that_vllm_was_told_not_to_adapt(run, adapter, told, left_out) -> None:
    options = [part for name in told for part in ("--target-modules", name)]
    ran = run("inspect", adapter, "--for", "vllm", *options, "--json")
    assert ran.code == bool(left_out)
    assert all(f"{left_out} module(s)" in problem and "without a word" in problem for problem in ran.facts["problems"])
    assert run("inspect", adapter, *options).code == 2


def test_an_adapter_that_is_no_plain_lora(run, fresh_base, tmp_path) -> None:
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    get_peft_model(fresh_base(), dora).save_pretrained(tmp_path / "dora")
    ran = run("inspect", tmp_path / "dora", "--json")
    assert ran.code == 0 and ran.facts["method"] == "LORA" and ran.facts["tensors"] == 6
    tuned = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4)
    get_peft_model(fresh_base(), tuned).save_pretrained(tmp_path / "tuned")
    ran = run("inspect", tmp_path / "tuned")
    assert ran.code == 1 and "trains an encoder of its own" in ran.out


def test_wrong_places_are_named(run, generator_folder, tmp_path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name, words in (
        ("typo", "neither a generator nor an adapter"),
        (".", "neither a generator"),
        ("file", "is a file"),
    ):
        ran = run("inspect", tmp_path / name)
        assert ran.code == 1 and words in ran.err
    assert run("inspect", generator_folder, "--served", "x").code == 2
    ran = run("inspect", generator_folder / "model.safetensors")
    assert ran.code == 1 and "is a file" in ran.err


def test_a_decoder_that_is_not_here_is_not_shown_as_if_it_were(run, generator_folder, tmp_path) -> None:
    config = json.loads((generator_folder / "config.json").read_text(encoding="utf-8"))
    for decoder_type in ("of_tomorrow", ["x"]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_type": decoder_type}), encoding="utf-8")
        ran = run("inspect", tmp_path)
        assert ran.code == 1 and not ran.out
        assert f"Unknown decoder_type {decoder_type!r}" in ran.err and "upgrade" in ran.err


def test_weights_that_are_cut_short(run, generator_folder, tmp_path) -> None:
    shutil.copytree(generator_folder, tmp_path / "generator")
    path = tmp_path / "generator" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    ran = run("inspect", tmp_path / "generator")
    assert ran.code == 1 and "model.safetensors" in ran.err
