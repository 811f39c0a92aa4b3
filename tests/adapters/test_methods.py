# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT's other methods: described by what PEFT saves, generated, collected, loaded by stock PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    BOFTConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from support.collecting import train
from support.live_models import OTHER_PROMPTS, PROMPTS, TOKENS, assert_untouched, snapshot
from support.methods import CAUSAL, INJECTED, METHODS, QV, SOFT, trained
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_dnd import (
    AdapterLayout,
    CheckpointCollector,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.adapters.factors import canonical_state_dict
from peft_dnd.adapters.layouts import (
    layout_from_config,
    layout_from_dict,
    layout_from_folder,
    layout_from_model,
    live_tensors,
)
from peft_dnd.adapters.tokenizer import WeightTokenizer
from peft_dnd.errors import BaseModelMismatchError, GeneratorConfigError, LayoutError


pytest_plugins = ("support.adapter_fixtures",)

GeneratorFor = Callable[[AdapterLayout], PromptConditionedLoraGenerator]
FreshBase = Callable[[], nn.Module]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :].float()


@pytest.mark.parametrize("name", METHODS)
def test_the_layout_is_what_peft_saves_however_it_is_read(
    name: str, fresh_base: FreshBase, base_model: nn.Module, tmp_path: Path
) -> None:
    before = snapshot(base_model)
    layout = layout_from_config(METHODS[name], base_model)
    assert_untouched(base_model, before)
    model = trained(fresh_base(), METHODS[name])
    model.save_pretrained(tmp_path)
    same = [
        layout_from_model(model),
        layout_from_folder(tmp_path),
        layout_from_dict(json.loads(json.dumps(layout.to_dict()))),
        layout_from_config(layout.peft_config(), base_model),
    ]
    assert [layout.difference(other) for other in same] == [None] * 4
    assert layout.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = {key: value.detach() for key, value in live_tensors(model, "default").items()}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(saved[key], value) for key, value in state.items())
    tokenizer = WeightTokenizer(layout)
    again = tokenizer.decode(tokenizer.encode(state))
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", METHODS)
def test_generated_saved_and_loaded_by_stock_peft(
    name: str, fresh_base: FreshBase, base_model: nn.Module, generator_for: GeneratorFor, tmp_path: Path
) -> None:
    layout = layout_from_config(METHODS[name], base_model)
    generator = generator_for(layout)
    generator.save_pretrained(tmp_path / "generator")
    generator = PromptConditionedLoraGenerator.from_pretrained(
        tmp_path / "generator", text_encoder=generator.text_encoder
    )
    adapter = generator.generate_adapter(PROMPTS)
    model = adapter.load_into(fresh_base())
    adapter.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(fresh_base(), tmp_path / "adapter")
    assert torch.equal(logits(stock), logits(model))
    assert not torch.allclose(logits(model), logits(base_model), atol=1e-4)
    assert type(model.peft_config["default"]) is type(METHODS[name])
    read = GeneratedAdapter.from_pretrained(tmp_path / "adapter")
    assert all(torch.equal(read.state_dict()[key], value) for key, value in adapter.state_dict().items())

    # Other prompts, into the same place; and what PEFT saves of that is the generated adapter again.
    other = generator.generate_adapter(OTHER_PROMPTS)
    parameters = {key: id(value) for key, value in live_tensors(model, "default").items()}
    other.load_into(model)
    assert parameters == {key: id(value) for key, value in live_tensors(model, "default").items()}
    assert torch.equal(logits(model), logits(other.load_into(fresh_base())))
    model.save_pretrained(tmp_path / "again")
    again = GeneratedAdapter.from_pretrained(tmp_path / "again")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", INJECTED)
def test_get_peft_model_takes_prompts(
    name: str, fresh_base: FreshBase, base_model: nn.Module, generator_for: GeneratorFor, tmp_path: Path
) -> None:
    generator = generator_for(layout_from_config(INJECTED[name], base_model))
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    model = get_peft_model(fresh_base(), config)
    expected = logits(generator.generate_adapter(PROMPTS).load_into(fresh_base()))
    assert torch.equal(logits(model), expected)
    assert type(model.peft_config["default"]) is type(INJECTED[name])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(), tmp_path)), expected)
    assert type(PeftConfig.from_pretrained(tmp_path)) is type(INJECTED[name])
    # The configuration may be used again.
    assert torch.equal(logits(get_peft_model(fresh_base(), config)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_base_of_another_form_is_refused_untouched(
    name: str, base_model: nn.Module, generator_for: GeneratorFor
) -> None:
    sizes = base_model.config.to_dict() | {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 3}
    other = LlamaForCausalLM(LlamaConfig(**sizes))
    generator = generator_for(layout_from_config(METHODS[name], base_model))
    before = snapshot(other)
    with pytest.raises(BaseModelMismatchError, match="does not fit this LlamaForCausalLM"):
        generator.generate_adapter(PROMPTS).load_into(other)
    assert_untouched(other, before)
    if name in INJECTED:
        before = snapshot(other)
        with pytest.raises(BaseModelMismatchError, match="does not fit this LlamaForCausalLM"):
            get_peft_model(other, DnDConfig(generator=generator, prompts=PROMPTS))
        assert_untouched(other, before)


def test_an_adapter_of_another_method_in_its_place_is_refused(
    fresh_base: FreshBase, base_model: nn.Module, generator_for: GeneratorFor
) -> None:
    adapter = generator_for(layout_from_config(INJECTED["IA3"], base_model)).generate_adapter(PROMPTS)
    model = trained(fresh_base(), INJECTED["LoHa"])
    before = logits(model)
    with pytest.raises(LayoutError, match="peft_type is 'IA3' in the first and 'LOHA' in the second"):
        adapter.load_into(model)

    first = layout_from_config(INJECTED["VeRA"], base_model)
    difference = first.difference(layout_from_config(VeraConfig(r=4, **QV), base_model))
    assert difference is not None and difference.startswith("r is 8 in the first and 4 in the second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4, **CAUSAL), "encoder of its own"),
        (PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **CAUSAL), "encoder of its own"),
        (BOFTConfig(boft_block_size=4, **QV), "BOFT adapter takes its form from the base's weights"),
        (LoraConfig(r=2, use_dora=True, init_lora_weights="pissa", **QV), "changes the base"),
        (LoraConfig(r=2, layer_replication=[[0, 2], [0, 2]], **QV), "layer_replication"),
    ],
    ids=["p-tuning", "projected prefix", "BOFT", "PiSSA", "replicated layers"],
)
def test_what_cannot_be_generated_is_refused_by_name(config: PeftConfig, words: str, base_model: nn.Module) -> None:
    with pytest.raises(LayoutError, match=words):
        layout_from_config(config, base_model)


def test_what_is_for_plain_lora_alone_says_so(
    base_model: nn.Module, encoder_folder: Path, generator_for: GeneratorFor, tmp_path: Path
) -> None:
    layout = layout_from_config(INJECTED["IA3"], base_model)
    generator = generator_for(layout)
    adapter = generator.generate_adapter(PROMPTS)
    with pytest.raises(LayoutError, match="for plain LoRA; this is the layout of a IA3 adapter"):
        canonical_state_dict(layout, adapter.state_dict())
    with pytest.raises(LayoutError, match=r"no plain LoRA configuration"):
        layout.lora_config()
    config = PromptConditionedLoraGeneratorConfig.from_adapters(layout, str(encoder_folder), decoder_type="core")
    with pytest.raises(GeneratorConfigError, match="'core' writes one of LoRA's two matrices"):
        PromptConditionedLoraGenerator(config)
    soft = generator_for(layout_from_config(SOFT["prompt tuning"], base_model))
    with pytest.raises(GeneratorConfigError, match=r"does not inject .*load_into"):
        DnDConfig(generator=soft, prompts=PROMPTS)
    with pytest.raises(GeneratorConfigError, match="whose form it decides"):
        DnDConfig(generator=generator, prompts=PROMPTS, r=4)
    with pytest.raises(LayoutError, match=r"Distillation is taken at the places .* and a PROMPT_TUNING adapter"):
        DnDTrainer(
            soft,
            DnDTrainingArguments(str(tmp_path), distillation_weight=1.0, use_cpu=True, report_to="none"),
            base_model=base_model,
        )


def test_experts_parameters(generator_for: GeneratorFor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, **sizes)
    base = MixtralForCausalLM(config).eval()
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    layout = layout_from_config(lora, base)
    assert any("experts" in tensor.key for tensor in layout.tensors)
    adapter = generator_for(layout).generate_adapter(PROMPTS)
    model = adapter.load_into(copy.deepcopy(base))
    adapter.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["DoRA", "IA3", "VeRA", "prompt tuning"])
def test_collected_fitted_and_generated(
    name: str, fresh_base: FreshBase, base_model: nn.Module, encoder_folder: Path, tmp_path: Path
) -> None:
    prompts = {
        "law": ["what is the law of the court ?", "a court please"],
        "food": ["a red apple", "the apple is red"],
    }
    for number, (task, lines) in enumerate(prompts.items()):
        torch.manual_seed(0)
        model = get_peft_model(fresh_base(), copy.deepcopy(METHODS[name]))
        collector = CheckpointCollector(tmp_path / "pairs" / task, prompts=lines, last=2)
        train(model, tmp_path / f"run-{task}", collector, data_seed=number, learning_rate=0.1)
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert len(pairs) == 4 and pairs.layout.difference(layout_from_config(METHODS[name], base_model)) is None
    config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, str(encoder_folder), num_prompts=2)
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config)
    arguments = DnDTrainingArguments(
        str(tmp_path / "fit"), max_steps=60, learning_rate=3e-3, save_strategy="no", use_cpu=True, report_to="none"
    )
    DnDTrainer(generator, arguments, pairs).train()
    # Each task's adapter comes out nearer to its own checkpoints than to the other's.
    adapters = generator.generate_adapters(prompts)
    for task, adapter in adapters.items():
        distance = {
            other: sum(
                float((value - adapter.state_dict()[key]).square().sum())
                for key, value in pairs.mean_state_dict(other).items()
            )
            for other in prompts
        }
        assert min(distance, key=distance.__getitem__) == task, distance
