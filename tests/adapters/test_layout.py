# SPDX-License-Identifier: Apache-2.0
"""The layout is the same whatever it is read from, and says what differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shapes import qwen_layout
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_dnd.adapters.layout import AdapterLayout, LoraModule
from peft_dnd.adapters.lora import inject_on_meta, live_state_dict, lora_layers
from peft_dnd.adapters.names import natural_key
from peft_dnd.errors import CorruptFileError, LayoutError, WeightValueError


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=37, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama(**overrides: Any) -> nn.Module:
    sizes = {
        "vocab_size": 53,
        "hidden_size": 28,
        "intermediate_size": 37,
        "num_hidden_layers": 11,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv1d(5, 7, 3), nn.Linear(7, 11))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "grouped queries, odd sizes": (llama, {"target_modules": "all-linear"}),
    "tied embeddings": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "Conv1D and embedding": (gpt2, {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    "rank-stabilised": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "some layers only": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [2, 10]}),
    "regular expression": (llama, {"target_modules": r".*layers\.[37]\..*(k|v)_proj"}),
    "convolutions": (convolutional, {"target_modules": ["0", "1", "2"]}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, LoraConfig]:
    make, settings = request.param
    return make(), LoraConfig(r=3, lora_alpha=6, **settings)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings`")
def test_same_from_config_model_and_folder(case: tuple[nn.Module, LoraConfig], tmp_path: Path) -> None:
    base, config = case
    from_config = AdapterLayout.from_lora_config(config, base)
    model = get_peft_model(base, copy.deepcopy(config))
    from_model = AdapterLayout.from_model(model)
    model.save_pretrained(tmp_path)
    from_folder = AdapterLayout.from_folder(tmp_path)

    assert from_config.difference(from_model) is None
    assert from_model.difference(from_folder) is None
    assert from_config.modules == from_model.modules == from_folder.modules
    from_model.check_state_dict(live_state_dict(model, "default"))
    assert from_model.num_parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings`")
def test_its_lora_config_gives_the_same_adapter_on_the_base(case: tuple[nn.Module, LoraConfig]) -> None:
    base, config = case
    layout = AdapterLayout.from_lora_config(config, base)
    again = AdapterLayout.from_model(get_peft_model(copy.deepcopy(base), layout.lora_config()))
    assert again.difference(layout) is None

    model = get_peft_model(base, config)
    scalings = {name: layer.scaling["default"] for name, layer in lora_layers(model, "default")}
    assert {module.name: layout.scaling(module) for module in layout.modules} == pytest.approx(scalings)


def test_survives_json(case: tuple[nn.Module, LoraConfig]) -> None:
    base, config = case
    layout = AdapterLayout.from_lora_config(config, base)
    assert AdapterLayout.from_dict(layout.to_dict()) == layout


def test_config_and_base_are_left_as_they_were(base_model: nn.Module, lora_config: LoraConfig) -> None:
    before = copy.deepcopy(lora_config), [name for name, _ in base_model.named_modules()]
    AdapterLayout.from_lora_config(lora_config, base_model)
    assert (lora_config, [name for name, _ in base_model.named_modules()]) == before


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"), [("0.5b", 4_399_104, 336), ("1.5b", 18_464_768, 392), ("7b", 40_370_176, 392)]
)
def test_published_sizes_on_the_meta_device(size: str, parameters: int, tensors: int) -> None:
    layout = qwen_layout(size)
    assert (layout.num_parameters, len(layout.tensors)) == (parameters, tensors)


def test_layers_stand_in_natural_order(layout: AdapterLayout) -> None:
    deep = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["q_proj"]), llama())
    numbers = [int(module.name.split(".")[2]) for module in deep.modules]
    assert numbers == list(range(11))
    assert [tensor.side for tensor in layout.tensors] == ["A", "B"] * len(layout.modules)
    assert natural_key("a2b") < natural_key("a10b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 4}, ["k_proj", "rank", "3", "4"]),
        ({"lora_alpha": 7}, ["alpha", "6", "7"]),
        ({"use_rslora": True}, ["use_rslora"]),
        ({"target_modules": ["q_proj"]}, ["k_proj", "first and not in the second"]),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, ["v_proj", "second and not in the first"]),
    ],
)
def test_difference_names_the_first(change: dict[str, Any], words: list[str], base_model: nn.Module) -> None:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"]}
    first = AdapterLayout.from_lora_config(LoraConfig(**settings), base_model)
    second = AdapterLayout.from_lora_config(LoraConfig(**{**settings, **change}), base_model)
    difference = first.difference(second)
    assert difference is not None
    assert all(word in difference for word in words)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_refuses_what_is_more_than_two_matrices(settings: dict[str, Any], base_model: nn.Module) -> None:
    name = next(iter(settings))
    with pytest.raises(LayoutError, match=name):
        AdapterLayout.from_lora_config(LoraConfig(target_modules=["q_proj"], **settings), base_model)


def test_adapter_that_saved_a_head(base_model: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(base_model), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**weights, "base_model.model.score.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LayoutError, match=r"score\.weight"):
        AdapterLayout.from_folder(tmp_path)


def test_folder_problems_are_named(trained_like: Callable[[int], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        AdapterLayout.from_folder(tmp_path / "typo")
    trained_like(0).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"adapter_model\.safetensors.*cut short"):
        AdapterLayout.from_folder(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json"):
        AdapterLayout.from_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(LayoutError, match="IA3"):
        AdapterLayout.from_folder(tmp_path)


def test_state_dict_is_checked(layout: AdapterLayout) -> None:
    good = {tensor.key: torch.ones(tensor.shape) for tensor in layout.tensors}
    layout.check_state_dict(good)
    key = layout.tensors[3].key
    with pytest.raises(LayoutError, match="lacks"):
        layout.check_state_dict({name: tensor for name, tensor in good.items() if name != key})
    with pytest.raises(LayoutError, match="not in the layout"):
        layout.check_state_dict({**good, "base_model.model.typo.lora_A.weight": torch.ones(1)})
    with pytest.raises(LayoutError, match="shape"):
        layout.check_state_dict({**good, key: torch.ones(1, 1)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WeightValueError, match="NaN or infinite"):
            layout.check_state_dict({**good, key: torch.full(good[key].shape, bad)})
    with pytest.raises(WeightValueError, match="meta"):
        layout.check_state_dict({**good, key: good[key].to("meta")})


def test_not_a_pair_of_matrices() -> None:
    for shape_a, shape_b in (((3, 4), (5, 2)), ((3,), (5, 3)), ((3, 0), (5, 3))):
        with pytest.raises(LayoutError, match="q_proj"):
            AdapterLayout((LoraModule("q_proj", "linear", shape_a, shape_b, 1.0),))
    with pytest.raises(LayoutError, match="at least one"):
        AdapterLayout(())


def test_missing_adapter_name_lists_those_there(trained_like: Callable[[int], nn.Module]) -> None:
    with pytest.raises(LayoutError, match=r"'typo'.*default"):
        AdapterLayout.from_model(trained_like(0), "typo")


class QuantisedParameter(nn.Parameter):
    """Like bitsandbytes' `Params4bit`: what PEFT reads from it when it wraps the layer."""

    quant_type: str


def test_a_quantised_weight_says_on_the_meta_device_too_how_it_was_quantised() -> None:
    base = llama()
    weight = base.model.layers[0].self_attn.q_proj.weight
    quantised = QuantisedParameter(weight.detach(), requires_grad=False)
    quantised.quant_type = "nf4"
    base.model.layers[0].self_attn.q_proj.weight = quantised
    skeleton = inject_on_meta(LoraConfig(r=2, target_modules=["q_proj"]), base)
    found = skeleton.model.layers[0].self_attn.q_proj.base_layer.weight
    assert found.device.type == "meta" and found.quant_type == "nf4"
    assert quantised.device.type == "cpu"
