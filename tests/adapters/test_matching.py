# SPDX-License-Identifier: Apache-2.0
"""A layout finds its modules in a base model, whatever wraps it, and refuses a base that it does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.live_models import assert_untouched, snapshot
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from peft_dnd.adapters.layout import AdapterLayout, LoraModule
from peft_dnd.adapters.matching import (
    BaseModelNameWarning,
    check_fits,
    lora_config_for,
    match_modules,
    warn_if_other_base,
)
from peft_dnd.errors import BaseModelMismatchError


FreshBase = Callable[[], nn.Module]


@pytest.mark.parametrize(
    ("head", "prefix"),
    [(LlamaModel, ""), (LlamaForQuestionAnswering, "transformer."), (LlamaForSequenceClassification, "model.")],
)
def test_the_same_module_is_found_under_every_head(
    head: type[nn.Module], prefix: str, layout: AdapterLayout, base_model: nn.Module
) -> None:
    model = head(base_model.config)
    names = match_modules(model, layout)
    assert names == {module.name: prefix + module.name.removeprefix("model.") for module in layout.modules}
    back = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert set(match_modules(base_model, back).values()) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_the_base_is_found_inside_wrappers(layout: AdapterLayout, fresh_base: FreshBase) -> None:
    class Wrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

    plain = {module.name: module.name for module in layout.modules}
    assert match_modules(fresh_base(), layout) == plain
    assert match_modules(torch.compile(fresh_base()), layout) == plain
    assert match_modules(Wrapper(fresh_base()), layout) == {name: f"backbone.{name}" for name in plain}
    adapted = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for model in (adapted, adapted.base_model, adapted.get_base_model(), torch.compile(adapted)):
        assert match_modules(model, layout) == plain
        check_fits(model, layout, plain)


def test_a_missing_module_is_named_with_what_there_is(layout: AdapterLayout, base_model: nn.Module) -> None:
    config = replace_layers(base_model, 1)
    model = type(base_model)(config)
    with pytest.raises(BaseModelMismatchError, match=r"no module 'model\.layers\.1\.mlp\.down_proj'") as error:
        match_modules(model, replace(layout, base_model_name_or_path="org/two-layers"))
    assert "start with 'model.layers.0.mlp.down_proj'" in str(error.value)
    assert "LlamaForCausalLM" in str(error.value)
    assert "org/two-layers" in str(error.value)


def test_two_candidates_are_refused(layout: AdapterLayout, fresh_base: FreshBase) -> None:
    towers = nn.ModuleDict({"left": fresh_base(), "right": fresh_base()})
    with pytest.raises(BaseModelMismatchError, match=r"could be 'left\.model.* or 'right\.model"):
        match_modules(towers, layout)


def test_a_decoder_is_not_taken_for_an_encoder() -> None:
    config = T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=1, vocab_size=20)
    regex = LoraConfig(r=2, target_modules=r"decoder\..*\.q")
    layout = AdapterLayout.from_lora_config(regex, T5ForConditionalGeneration(config))
    with pytest.raises(BaseModelMismatchError, match=r"decoder\.block"):
        match_modules(T5EncoderModel(config), layout)
    attention = LoraConfig(target_modules=r".*\.SelfAttention\.q")
    both = AdapterLayout.from_lora_config(attention, T5ForConditionalGeneration(config))
    assert len(set(match_modules(T5ForConditionalGeneration(config), both).values())) == len(both.modules)
    with pytest.raises(BaseModelMismatchError, match="would both be"):
        match_modules(T5EncoderModel(config).encoder, both)


def test_a_layer_number_stays_with_its_list() -> None:
    layout = one_module("layers.0.proj", (2, 4), (4, 2))
    other_list = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)})])})
    with pytest.raises(BaseModelMismatchError, match=r"layers\.0\.proj"):
        match_modules(other_list, layout)
    top_list = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)})])
    with pytest.raises(BaseModelMismatchError, match=r"layers\.0\.proj"):
        match_modules(top_list, layout)


@pytest.mark.parametrize(
    ("layer", "shape_a", "shape_b", "kind"),
    [
        (nn.Linear(6, 4), (2, 6), (4, 2), "linear"),
        (nn.Conv2d(6, 4, 3), (2, 6, 3, 3), (4, 2, 1, 1), "linear"),
        (nn.Conv1d(6, 4, 5), (2, 6, 5), (4, 2, 1), "linear"),
        (nn.Embedding(6, 4), (2, 6), (4, 2), "embedding"),
    ],
)
def test_layers_of_every_kind_are_measured(
    layer: nn.Module, shape_a: tuple[int, ...], shape_b: tuple[int, ...], kind: str
) -> None:
    def check(layout: AdapterLayout) -> None:
        check_fits(nn.ModuleDict({"x": layer}), layout, {"x": "x"})

    check(one_module("x", shape_a, shape_b, kind))
    for wrong in (
        one_module("x", (2, 7, *shape_a[2:]), shape_b, kind),
        one_module("x", shape_a, (5, *shape_b[1:]), kind),
        one_module("x", shape_a, shape_b, "embedding" if kind == "linear" else "linear"),
        one_module("x", (*shape_a, 7), (*shape_b, 1), kind),
    ):
        with pytest.raises(BaseModelMismatchError, match="module 'x' is a"):
            check(wrong)


def test_conv1d_of_gpt2_is_measured_the_right_way_round() -> None:
    def model(width: int) -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=1, n_head=2, vocab_size=20, n_positions=8))

    lora = LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    layout = AdapterLayout.from_lora_config(lora, model(8))
    check_fits(model(8), layout, match_modules(model(8), layout))
    with pytest.raises(BaseModelMismatchError, match=r"Conv1D from 12 to 36; .* from 8 to 24"):
        check_fits(model(12), layout, match_modules(model(12), layout))


def test_a_base_without_weights_is_refused(layout: AdapterLayout, fresh_base: FreshBase) -> None:
    model = fresh_base().to("meta")
    with pytest.raises(BaseModelMismatchError, match="meta device"):
        check_fits(model, layout, match_modules(model, layout))


@pytest.mark.parametrize(
    ("fitted", "found", "warns"),
    [
        ("org/base", "org/base", False),
        ("org/base", "/models/base/", False),
        ("org/base", "C:\\models\\base", False),
        ("org/base", "/cache/models--org--base/snapshots/0123abc", False),
        ("org/base", "org/base-instruct", True),
        ("org/base", "/models/checkpoint-100", True),
        (None, "org/other", False),
        ("org/base", "", False),
    ],
)
def test_another_base_of_the_same_shapes_is_warned_of(
    fitted: str | None, found: str, warns: bool, layout: AdapterLayout, fresh_base: FreshBase
) -> None:
    model = fresh_base()
    model.name_or_path = found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_other_base(model, replace(layout, base_model_name_or_path=fitted))
    assert [warning.category for warning in caught] == [BaseModelNameWarning] * warns


def test_peft_adapts_just_the_layout_s_modules(base_model: nn.Module) -> None:
    regex = LoraConfig(r=2, target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj")
    layout = AdapterLayout.from_lora_config(regex, base_model)
    names = match_modules(base_model, layout)
    assert lora_config_for(base_model, layout, names).target_modules == regex.target_modules
    bare = LlamaModel(base_model.config)
    names = match_modules(bare, layout)
    listed = lora_config_for(bare, layout, names, settings={"lora_dropout": 0.5})
    assert listed.target_modules == set(names.values())
    assert listed.lora_dropout == 0.5


def test_what_adapters_have_put_into_a_model_is_not_counted(base_model: nn.Module, fresh_base: FreshBase) -> None:
    regex = LoraConfig(r=2, target_modules=r".*\.q_proj.*", modules_to_save=["lm_head"])
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=r".*\.q_proj.*"), base_model)
    model = get_peft_model(fresh_base(), regex)
    names = match_modules(model, layout)
    assert lora_config_for(model, layout, names).target_modules == regex.target_modules


def test_more_layers_than_the_generator_writes_are_refused(base_model: nn.Module) -> None:
    layout = AdapterLayout.from_lora_config(LoraConfig(target_modules=["q_proj", "v_proj"]), base_model)
    model = type(base_model)(replace_layers(base_model, 3))
    before = snapshot(model)
    with pytest.raises(BaseModelMismatchError, match=r"it has 'model\.layers\.2\..*' \(2 such modules\)"):
        lora_config_for(model, layout, match_modules(model, layout))
    assert_untouched(model, before)
    # A layout that names its modules one by one was meant for some of the layers.
    some = AdapterLayout.from_lora_config(LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]), model)
    assert len(lora_config_for(model, some, match_modules(model, some)).target_modules) == 2


def test_modules_to_save_must_not_cover_an_adapted_module(base_model: nn.Module) -> None:
    layout = AdapterLayout.from_lora_config(LoraConfig(target_modules=["lm_head", "q_proj"]), base_model)
    names = match_modules(base_model, layout)
    with pytest.raises(BaseModelMismatchError, match=r"'lm_head' cannot be adapted: modules_to_save=\['lm_head'\]"):
        lora_config_for(base_model, layout, names, settings={"modules_to_save": ["lm_head"]})


def one_module(name: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...], kind: str = "linear") -> AdapterLayout:
    return AdapterLayout((LoraModule(name, kind, shape_a, shape_b, alpha=4),))


def replace_layers(model: nn.Module, count: int) -> object:
    return type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": count})
