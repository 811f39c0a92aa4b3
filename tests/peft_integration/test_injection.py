# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from support.live_models import OTHER_PROMPTS, PROMPTS, assert_holds, logits
from torch import nn
from transformers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.adapters.matching import BaseModelNameWarning
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration import injection
from peft_dnd.peft_integration.config import DnDConfig


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]
MakeConfig = Callable[..., DnDConfig]
GeneratorFor = Callable[[AdapterLayout], PromptConditionedLoraGenerator]


def test_get_peft_model(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor
) -> None:
    config = dnd()
    before = copy.deepcopy(config)
    model = get_peft_model(fresh_base(), config)
    assert isinstance(model, PeftModelForCausalLM)
    assert_holds(model, "default", adapter)
    assert torch.equal(logits(model), expected)
    before.base_model_name_or_path = config.base_model_name_or_path  # PEFT writes it there, as into any configuration
    assert config == before
    assert all(parameter.requires_grad for parameter in live_state_dict(model, "default").values())


def test_peft_model_and_injection_by_hand(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor
) -> None:
    model = PeftModel(fresh_base(), dnd(), "law", autocast_adapter_dtype=False)
    assert_holds(model, "law", adapter)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(inject_adapter_in_model(dnd(), fresh_base())), expected)


def test_a_saved_model_is_an_ordinary_adapter(
    dnd: MakeConfig, fresh_base: FreshBase, expected: torch.Tensor, tmp_path: Path
) -> None:
    get_peft_model(fresh_base(), dnd()).save_pretrained(tmp_path)
    assert "dnd" not in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(), tmp_path)), expected)


def test_add_adapter_after_a_plain_and_after_a_generated_one(
    dnd: MakeConfig,
    fresh_base: FreshBase,
    adapter: GeneratedAdapter,
    other_adapter: GeneratedAdapter,
    expected: torch.Tensor,
) -> None:
    model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = logits(model)
    model.add_adapter("law", dnd())
    model.add_adapter("med", dnd(prompts=OTHER_PROMPTS))
    model.add_adapter("late", LoraConfig(target_modules=["v_proj"]))
    assert torch.equal(logits(model), plain)
    assert_holds(model, "law", adapter)
    assert_holds(model, "med", other_adapter)
    model.set_adapter("law")
    assert torch.equal(logits(model), expected)
    model.set_adapter("med")
    assert torch.equal(logits(model), logits(other_adapter.load_into(fresh_base())))


@pytest.mark.parametrize("targets", ["suffixes", "regex"])
def test_mixed_models(targets: str, base_model: nn.Module, fresh_base: FreshBase, generator_for: GeneratorFor) -> None:
    patterns = {"suffixes": ["q_proj", "v_proj"], "regex": r"model\.layers\.\d\.self_attn\.[qv]_proj"}
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=patterns[targets]), base_model)
    generator = generator_for(layout)
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    wanted = logits(generator.generate_adapter(PROMPTS).load_into(fresh_base()))
    model = get_peft_model(fresh_base(), config, mixed=True)
    assert torch.equal(logits(model), wanted)
    model = get_peft_model(fresh_base(), LoraConfig(target_modules=["k_proj"]), mixed=True)
    model.add_adapter("law", config)
    model.set_adapter("law")
    assert torch.equal(logits(model), wanted)


def test_low_cpu_mem_usage(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor
) -> None:
    injection.release_generator()  # so that it is loaded inside PEFT's meta context
    model = get_peft_model(fresh_base(), dnd(), low_cpu_mem_usage=True)
    assert_holds(model, "default", adapter)
    assert torch.equal(logits(model), expected)
    model.add_adapter("again", dnd(), low_cpu_mem_usage=True)
    assert_holds(model, "again", adapter)
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("wrapper", "task_type", "head", "saved"),
    [
        (PeftModelForSequenceClassification, "SEQ_CLS", LlamaForSequenceClassification, "score"),
        (PeftModelForTokenClassification, "TOKEN_CLS", LlamaForTokenClassification, "score"),
        (PeftModelForQuestionAnswering, "QUESTION_ANS", LlamaForQuestionAnswering, "qa_outputs"),
        (PeftModelForFeatureExtraction, "FEATURE_EXTRACTION", LlamaModel, None),
    ],
)
def test_every_other_task_type(
    wrapper: type[PeftModel],
    task_type: str,
    head: type[PreTrainedModel],
    saved: str | None,
    dnd: MakeConfig,
    base_model: nn.Module,
    adapter: GeneratedAdapter,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = head(base_model.config)
    base.config.pad_token_id = 0
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, dnd(task_type=task_type))
    assert type(model) is wrapper
    assert_holds(model, "default", adapter)
    model.save_pretrained(tmp_path / "one")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "one")
    assert torch.equal(logits(reloaded), logits(model))
    if saved:
        assert saved in model.peft_config["default"].modules_to_save
        with torch.no_grad():  # the head is trained and saved along, or this would not survive
            dict(model.named_parameters())[f"base_model.model.{saved}.modules_to_save.default.weight"].add_(1.0)
        model.save_pretrained(tmp_path / "two")
        reloaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "two")
        assert torch.equal(logits(reloaded), logits(model))
    model.add_adapter("more", dnd(task_type=task_type))
    assert_holds(model, "more", adapter)


def test_sequence_to_sequence(generator_for: GeneratorFor) -> None:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=1, vocab_size=20, decoder_start_token_id=0)
    ).eval()
    lora = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    layout = AdapterLayout.from_lora_config(lora, base)
    model = get_peft_model(base, DnDConfig(generator=generator_for(layout), prompts=PROMPTS))
    assert type(model) is PeftModelForSeq2SeqLM
    assert layout.difference(AdapterLayout.from_model(model)) is None


def test_one_configuration_may_be_used_again(dnd: MakeConfig, base_model: nn.Module, fresh_base: FreshBase) -> None:
    config = dnd(task_type="TOKEN_CLS")
    models = [get_peft_model(LlamaForTokenClassification(base_model.config), config) for _ in range(2)]
    lists = [model.peft_config["default"].modules_to_save for model in models]
    assert lists[0] == ["classifier", "score"]  # untouched by the second use
    assert set(lists[1]) == {"classifier", "score"}
    config = dnd()
    first, second = (get_peft_model(fresh_base(), config) for _ in range(2))
    assert torch.equal(logits(first), logits(second))
    assert first.peft_config["default"] is not second.peft_config["default"]


def test_a_half_precision_base(dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(fresh_base().to(torch.bfloat16), dnd(), autocast_adapter_dtype=autocast)
        live = live_state_dict(model, "default")
        assert {tensor.dtype for tensor in live.values()} == {dtype}
        # PEFT makes the matrices in the base's dtype before it casts them, as it does for PiSSA.
        assert all(
            torch.equal(live[key].bfloat16(), tensor.bfloat16()) for key, tensor in adapter.state_dict().items()
        )
    model.add_adapter("law", dnd(), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    assert {tensor.dtype for tensor in live_state_dict(model, "law").values()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_another_alpha_scales_the_adapter(dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter) -> None:
    model = get_peft_model(fresh_base(), dnd(lora_alpha=3, lora_dropout=0.5))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 1.0
    assert layer.lora_dropout["default"].p == 0.5
    assert_holds(model, "default", adapter)
    assert model.peft_config["default"].lora_alpha == 3


def test_weighted_combination_and_merge(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor
) -> None:
    model = get_peft_model(fresh_base(), dnd(), "law")
    model.add_adapter("med", dnd(prompts=OTHER_PROMPTS))
    model.add_weighted_adapter(["law", "med"], [1.0, 0.0], "both", combination_type="linear")
    assert type(model.peft_config["both"]) is LoraConfig
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected)
    model.add_adapter("copy", model.peft_config["law"])  # as TRL makes a reference policy; weights are PEFT's own
    model.set_adapter("law")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)


def test_hot_swap_by_peft(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, adapter_folder: str, expected: torch.Tensor
) -> None:
    model = get_peft_model(fresh_base(), dnd(prompts=OTHER_PROMPTS))
    hotswap_adapter(model, adapter_folder, adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), expected)
    model = get_peft_model(fresh_base(), dnd(prompts=OTHER_PROMPTS))
    state = {key.replace(".weight", ".default.weight"): tensor for key, tensor in adapter.state_dict().items()}
    hotswap_adapter_from_state_dict(model, state, adapter_name="default", config=adapter.peft_config)
    assert torch.equal(logits(model), expected)
    model = get_peft_model(fresh_base(), dnd(prompts=OTHER_PROMPTS))
    assert torch.equal(logits(adapter.load_into(model)), expected)


def test_auto_peft_model(dnd: MakeConfig, base_model: nn.Module, expected: torch.Tensor, tmp_path: Path) -> None:
    base_model.save_pretrained(tmp_path / "base")
    base = type(base_model).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, dnd())
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.parametrize(("name", "categories"), [("org/base", []), ("org/other", [BaseModelNameWarning])])
def test_only_a_base_of_another_name_is_warned_of(
    name: str, categories: list[type], layout: AdapterLayout, generator_for: GeneratorFor, fresh_base: FreshBase
) -> None:
    generator = generator_for(replace(layout, base_model_name_or_path="org/base"))
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    for use in (lambda base: get_peft_model(base, config), generator.generate_adapter(PROMPTS).load_into):
        base = fresh_base()
        base.name_or_path = name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = use(base)
        assert [warning.category for warning in caught if issubclass(warning.category, UserWarning)] == categories
        assert model.peft_config["default"].base_model_name_or_path == name


def test_models_are_copied_and_pickled(dnd: MakeConfig, fresh_base: FreshBase, expected: torch.Tensor) -> None:
    model = get_peft_model(fresh_base(), dnd())
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_a_pickled_configuration_still_generates(
    dnd: MakeConfig, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    for config in (copy.deepcopy(dnd()), pickle.loads(pickle.dumps(dnd()))):
        assert torch.equal(logits(get_peft_model(fresh_base(), config)), expected)


def test_a_live_generator(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    assert torch.equal(logits(get_peft_model(fresh_base(), copy.deepcopy(config))), expected)
    assert torch.equal(logits(get_peft_model(fresh_base(), config, low_cpu_mem_usage=True)), expected)


def test_embedding_adapters(base_model: nn.Module, fresh_base: FreshBase, generator_for: GeneratorFor) -> None:
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "o_proj"])
    generator = generator_for(AdapterLayout.from_lora_config(lora, base_model))
    generated = generator.generate_adapter(PROMPTS)
    for low_cpu_mem_usage in (False, True):
        config = DnDConfig(generator=generator, prompts=PROMPTS)
        model = get_peft_model(fresh_base(), config, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_holds(model, "default", generated)
        assert torch.equal(logits(model), logits(generated.load_into(fresh_base())))
