# SPDX-License-Identifier: Apache-2.0
"""`export`: what was wrong with an adapter for an engine is mended, and the update stays what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from peft_dnd import GeneratedAdapter


@pytest.fixture
def uneven(fresh_base, tmp_path: Path) -> Path:
    """An adapter of several ranks and scalings, none of them zero."""
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        rank_pattern={"q_proj": 4, "up_proj": 1},
        alpha_pattern={"v_proj": 5},
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj"],
        init_lora_weights=False,
        base_model_name_or_path="org/base",
    )
    torch.manual_seed(0)
    get_peft_model(fresh_base(), config).save_pretrained(tmp_path / "uneven")
    path = tmp_path / "uneven" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}))
    return tmp_path / "uneven"


def logits(base: torch.nn.Module, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=torch.tensor([[3, 14, 15, 9]])).logits


def test_for_vllm_one_rank_and_the_served_name(run, uneven, fresh_base, tmp_path) -> None:
    refused = run("inspect", uneven, "--for", "vllm", "--served", "/models/base", "--json")
    assert refused.code == 1 and len(refused.facts["problems"]) == 3
    ran = run("export", uneven, tmp_path / "out", "--to", "vllm", "--served", "/models/base", "--json")
    assert ran.code == 0, ran.err
    assert ran.facts["rank"] == 4 and ran.facts["base_model"] == "/models/base" and ran.facts["renamed_modules"] == 0
    assert run("inspect", tmp_path / "out", "--for", "vllm", "--served", "/models/base").code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert torch.allclose(logits(fresh_base(), uneven), logits(fresh_base(), tmp_path / "out"), atol=1e-5)


def test_what_is_even_stays_as_it_is(run, generator, tmp_path) -> None:
    made = generator.generate_adapter(["what is the law ?"])
    made.save_pretrained(tmp_path / "even")
    assert run("export", tmp_path / "even", tmp_path / "out", "--to", "vllm").code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "even" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_text_adapter_gets_the_names_of_a_vision_language_class(run, tmp_path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=40)
    vision = SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=1)
    config.architectures = [Gemma3ForConditionalGeneration.__name__]
    config.save_pretrained(tmp_path / "vl")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    base = Gemma3ForCausalLM(text)
    get_peft_model(base, lora).save_pretrained(tmp_path / "text")
    refused = run("inspect", tmp_path / "text", "--for", "vllm", "--base", tmp_path / "vl", "--json")
    assert refused.code == 1
    (named,) = [problem for problem in refused.facts["problems"] if "applies nothing" in problem]
    assert "14 module(s)" in named and "model.language_model.layers.0" in named
    ran = run("export", tmp_path / "text", tmp_path / "out", "--to", "vllm", "--base", tmp_path / "vl", "--json")
    assert ran.code == 0 and ran.facts["renamed_modules"] == 14, ran.err
    assert run("inspect", tmp_path / "out", "--for", "vllm", "--base", tmp_path / "vl").code == 0
    torch.manual_seed(0)
    wrapper = Gemma3ForConditionalGeneration(config).eval()
    inside = PeftModel.from_pretrained(wrapper, str(tmp_path / "out"))
    before = GeneratedAdapter.from_pretrained(tmp_path / "text").state_dict()
    layer = inside.base_model.model.model.language_model.layers[1].mlp.up_proj
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert torch.equal(layer.lora_A["default"].weight.float(), before[key])


def test_to_gguf(run, generator, base_folder, tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    generator.generate_adapter(["what is the law ?"]).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "new" / "adapter.gguf"
    ran = run("export", tmp_path / "adapter", out, "--to", "gguf", "--base", base_folder, "--json")
    assert ran.code == 0, ran.err
    assert ran.facts["bytes"] == out.stat().st_size
    assert {tensor.name for tensor in gguf.GGUFReader(out).tensors} >= {"blk.0.attn_q.weight.lora_a"}
    AutoModelForCausalLM.from_pretrained(base_folder)  # the base's folder is as it was


def test_what_does_not_go_together_and_what_is_not_there(run, generator, base_folder, tmp_path) -> None:
    generator.generate_adapter(["what is the law ?"]).save_pretrained(tmp_path / "adapter")
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    assert run("export", adapter, out).code == 2
    assert run("export", adapter, out, "--to", "gguf").code == 2
    assert run("export", adapter, out, "--to", "gguf", "--base", base_folder, "--served", "x").code == 2
    assert run("export", adapter, out, "--to", "vllm", "--architecture", "llama").code == 2
    assert run("export", adapter, out, "--to", "ggfu", "--base", base_folder).code == 2
    for arguments, words in (
        ((tmp_path / "typo", out, "--to", "vllm"), "typo"),
        ((base_folder, out, "--to", "vllm"), "adapter"),
        ((adapter, out, "--to", "gguf", "--base", tmp_path / "typo"), "typo"),
        ((adapter, out, "--to", "vllm", "--base", tmp_path / "typo"), "typo"),
        ((adapter, tmp_path, "--to", "gguf", "--base", base_folder), "is a folder"),
    ):
        ran = run("export", *arguments)
        assert ran.code == 1 and words in ran.err, ran
    assert not out.exists()
