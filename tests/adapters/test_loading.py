# SPDX-License-Identifier: Apache-2.0
"""An adapter put into a live model works there as where it was trained, and a wrong model stays untouched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from support.live_models import TOKENS, assert_untouched, logits, snapshot
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
)

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.loading import fill_adapter, load_matrices, real_parameters
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.adapters.matching import match_modules
from peft_dnd.errors import BaseModelMismatchError, LayoutError, WeightValueError


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]


def test_a_base_becomes_a_peft_model(adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor) -> None:
    model = adapter.load_into(fresh_base())
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, logits(fresh_base()), atol=1e-2)
    assert type(model.peft_config["default"]) is LoraConfig
    live = live_state_dict(model, "default")
    assert all(torch.equal(live[key], tensor) for key, tensor in adapter.state_dict().items())
    assert all(parameter.requires_grad for parameter in live.values())


def test_an_adapter_is_added_beside_others(
    adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = logits(model)
    assert adapter.load_into(model, "law") is model
    assert model.active_adapter == "law"
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), plain)


def test_mixed_and_injected_models_take_it(
    adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    mixed = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(adapter.load_into(mixed, "law"), PeftMixedModel)
    assert torch.equal(logits(mixed), expected)

    injected = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), fresh_base())
    assert adapter.load_into(injected, "law") is injected
    assert torch.equal(logits(injected), expected)

    native = fresh_base()
    native.add_adapter(LoraConfig(target_modules=["q_proj"]), "first")
    assert adapter.load_into(native, "law") is native
    assert torch.equal(logits(native), expected)
    assert native.active_adapters() == ["law"]


def test_a_hot_swap_changes_the_values_and_nothing_else(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    model = other_adapter.load_into(fresh_base(), "law")
    for name in ("law2", "outlaw"):  # names that contain the swapped one's
        other_adapter.load_into(model, name)
    before = logits(model)
    model.set_adapter("law2")
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert adapter.load_into(model, "law") is model
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert len(optimiser.param_groups[0]["params"]) == 2 * len(adapter.layout.modules)
    assert model.active_adapter == "law2"
    for name in ("law2", "outlaw"):
        model.set_adapter(name)
        assert torch.equal(logits(model), before)
    model.set_adapter("law")
    assert torch.equal(logits(model), expected)


def test_a_compiled_model_is_swapped_without_recompilation(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    model = other_adapter.load_into(fresh_base())
    model.eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(input_ids=TOKENS)
        count = len(graphs)
        assert adapter.load_into(compiled) is compiled
        assert torch.equal(compiled(input_ids=TOKENS).logits, expected)
    assert len(graphs) == count > 0


def test_training_a_filled_adapter_leaves_the_generated_one_alone(
    adapter: GeneratedAdapter, fresh_base: FreshBase
) -> None:
    before = copy.deepcopy(adapter.state_dict())
    for low_cpu_mem_usage in (False, True):
        model = get_peft_model(fresh_base(), adapter.peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        adapter.load_into(model)
        with torch.no_grad():
            for parameter in live_state_dict(model, "default").values():
                parameter.add_(1.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())


def test_matrices_on_the_meta_device_become_real(
    adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    model = get_peft_model(fresh_base(), adapter.peft_config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in live_state_dict(model, "default").values())
    with init_empty_weights():
        fill_adapter(model, "default", adapter.layout, adapter.state_dict(), match_modules(model, adapter.layout))
    assert torch.equal(logits(model), expected)
    assert all(parameter.requires_grad for parameter in live_state_dict(model, "default").values())


def test_embeddings_and_conv1d_are_filled(fresh_base: FreshBase) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).eval()
    config = LoraConfig(
        r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True, rank_pattern={"c_attn": 4}, use_rslora=True
    )
    reference = get_peft_model(copy.deepcopy(gpt2), config)
    with torch.no_grad():
        for parameter in live_state_dict(reference, "default").values():
            parameter.normal_()
    layout = AdapterLayout.from_model(reference)
    generated = GeneratedAdapter(layout, live_state_dict(reference, "default"), {})
    assert torch.equal(logits(generated.load_into(copy.deepcopy(gpt2))), logits(reference))
    empty = get_peft_model(copy.deepcopy(gpt2), config, low_cpu_mem_usage=True)
    with init_empty_weights():
        fill_adapter(empty, "default", layout, generated.state_dict(), match_modules(empty, layout))
    assert torch.equal(logits(empty), logits(reference))


def test_a_half_precision_base_keeps_the_matrices_exact(adapter: GeneratedAdapter, fresh_base: FreshBase) -> None:
    model = adapter.load_into(fresh_base().to(torch.bfloat16))
    live = live_state_dict(model, "default")
    assert all(torch.equal(live[key], tensor) for key, tensor in adapter.state_dict().items())
    half = get_peft_model(fresh_base().to(torch.bfloat16), adapter.peft_config, autocast_adapter_dtype=False)
    load_matrices(half, "default", adapter.layout, adapter.state_dict())
    live = live_state_dict(half, "default")
    assert all(torch.equal(live[key], tensor.bfloat16()) for key, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_wrong_base_is_refused_untouched(wrapped: bool, adapter: GeneratedAdapter, fresh_base: FreshBase) -> None:
    config = fresh_base().config
    config.intermediate_size = 41
    model = type(fresh_base())(config)
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(BaseModelMismatchError, match=r"'model\.layers\.0\.mlp\.down_proj' is a Linear from 41 to 24"):
        adapter.load_into(model, "law")
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"r": 4}, r"shape \(4, .* has \(3, "),
        ({"lora_alpha": 12}, "scales .* by 4; .* by 2"),
        ({"use_rslora": True}, "scales .* by 3.4641; .* by 2"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj"]}, r"no matrices at 'model\.layers\.0\.mlp\.down_proj'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no matrices"),
    ],
)
def test_a_hot_swap_onto_another_kind_of_adapter_says_what_differs(
    change: dict[str, object], what: str, adapter: GeneratedAdapter, fresh_base: FreshBase
) -> None:
    model = get_peft_model(fresh_base(), replace(adapter.peft_config, **change))
    before = snapshot(model)
    with pytest.raises(LayoutError, match=what):
        adapter.load_into(model)
    assert_untouched(model, before)


def test_a_hot_swap_onto_more_modules_or_merged_ones_is_refused(
    adapter: GeneratedAdapter, fresh_base: FreshBase
) -> None:
    more = replace(adapter.peft_config, target_modules=[*adapter.peft_config.target_modules, "embed_tokens"])
    with pytest.raises(LayoutError, match=r"also adapts 'model\.embed_tokens'"):
        adapter.load_into(get_peft_model(fresh_base(), more))
    model = adapter.load_into(fresh_base())
    model.merge_adapter()
    with pytest.raises(LayoutError, match="unmerge_adapter"):
        adapter.load_into(model)
    model.unmerge_adapter()
    assert adapter.load_into(model) is model
    prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert adapter.load_into(model) is model


def test_where_peft_has_prepared_the_model_other_ranks_and_scalings_are_swapped_in(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    model = other_adapter.load_into(fresh_base())
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert adapter.load_into(model) is model
    assert torch.allclose(logits(model), expected, atol=1e-6)

    config = LoraConfig(r=2, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    smaller = get_peft_model(fresh_base(), config)
    layout, matrices = AdapterLayout.from_model(smaller), live_state_dict(smaller, "default")
    load_matrices(model, "default", layout, matrices)
    assert torch.allclose(logits(model), logits(smaller), atol=1e-6)
    adapter.load_into(model)
    assert torch.allclose(logits(model), expected, atol=1e-6), "nothing of the other adapter is left"

    larger = LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False)
    layout = AdapterLayout.from_lora_config(larger, fresh_base())
    before = snapshot(model)
    with pytest.raises(LayoutError, match=r"shape \(5, \d+\) where the new one has \(6, "):
        load_matrices(model, "default", layout, {t.key: torch.ones(t.shape) for t in layout.tensors})
    assert_untouched(model, before)


def test_a_classifier_head_beside_the_matrices_stays(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, base_model: nn.Module
) -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(base_model.config)
    base.config.pad_token_id = 0
    config = replace(adapter.peft_config, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.fill_(0.5)
    load_matrices(model, "default", other_adapter.layout, other_adapter.state_dict())
    swapped = logits(model)
    load_matrices(model, "default", adapter.layout, adapter.state_dict())
    assert not torch.equal(logits(model), swapped)
    assert torch.all(model.get_base_model().score.modules_to_save["default"].weight == 0.5)


def test_a_meta_source_is_refused_before_anything_is_copied(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, fresh_base: FreshBase
) -> None:
    model = other_adapter.load_into(fresh_base())
    before = snapshot(model)
    last = adapter.layout.tensors[-1].key
    for bad in (adapter.state_dict()[last].to("meta"), torch.full_like(adapter.state_dict()[last], torch.nan)):
        with pytest.raises(WeightValueError, match=last.replace(".", r"\.")):
            load_matrices(model, "default", adapter.layout, {**adapter.state_dict(), last: bad})
        assert_untouched(model, dict(before))


def test_real_parameters_escapes_every_meta_context() -> None:
    with init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta
        with real_parameters():
            assert not nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    with torch.device("meta"):
        with real_parameters():
            assert not nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("head", "prefix"), [(LlamaForQuestionAnswering, "model.transformer.layers"), (LlamaModel, "model.layers")]
)
def test_heads_that_cannot_generate_take_it(
    head: type[nn.Module], prefix: str, adapter: GeneratedAdapter, base_model: nn.Module
) -> None:
    model = adapter.load_into(head(base_model.config))
    assert type(model) is PeftModel
    live = live_state_dict(model, "default")
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(live[key.replace("model.model.layers", prefix)], tensor)


def test_a_load_of_ours_brings_no_deprecation_of_others(fresh_base: FreshBase, adapter: GeneratedAdapter) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter.load_into(fresh_base())
    assert not [warning for warning in caught if "is_gradient_checkpointing" in str(warning.message)]
