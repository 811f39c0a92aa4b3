# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
from support.live_models import PROMPTS
from torch import nn

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import GeneratorConfigError, GeneratorNotFoundError, PromptError, PromptTypeError
from peft_dnd.generator.configuration import PromptConditionedLoraGeneratorConfig
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration.config import DnDConfig


FreshBase = Callable[[], nn.Module]


def test_it_knows_the_adapter_s_form_at_once(generator_folder: Path, layout: AdapterLayout) -> None:
    config = DnDConfig(generator=str(generator_folder), prompts=PROMPTS)
    assert (config.r, config.lora_alpha, config.use_rslora, config.fan_in_fan_out) == (3, 6, False, False)
    assert config.target_modules == set(layout.target_modules or ())
    assert config.task_type == "CAUSAL_LM"
    assert config.peft_type == "LORA"
    assert config.prompts == PROMPTS
    assert config.base_model_name_or_path is None


def test_only_the_configuration_file_is_read(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    generator.config.save_pretrained(tmp_path)
    assert DnDConfig(generator=str(tmp_path), prompts=PROMPTS).r == 3
    assert DnDConfig(generator=tmp_path, prompts=PROMPTS).generator == str(tmp_path)  # type: ignore[arg-type]


def test_patterns_and_scaling_come_from_the_layout(
    base_model: nn.Module, encoder_folder: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5},
        alpha_pattern={"v_proj": 16},
        use_rslora=True,
    )
    layout = AdapterLayout.from_lora_config(lora, base_model)
    PromptConditionedLoraGeneratorConfig.from_adapters(layout, str(encoder_folder)).save_pretrained(tmp_path)
    config = DnDConfig(generator=str(tmp_path), prompts=PROMPTS)
    assert config.use_rslora is True
    assert config.task_type is None
    assert AdapterLayout.from_lora_config(config.to_plain_config(), base_model).difference(layout) is None
    with pytest.raises(GeneratorConfigError, match=r"lora_alpha=5; .* lora_alpha=\d+"):
        DnDConfig(generator=str(tmp_path), prompts=PROMPTS, lora_alpha=5)
    with pytest.raises(GeneratorConfigError, match="use_rslora=False"):
        DnDConfig(generator=str(tmp_path), prompts=PROMPTS, use_rslora=False)
    with pytest.raises(GeneratorConfigError, match="alpha_pattern"):
        DnDConfig(generator=str(tmp_path), prompts=PROMPTS, alpha_pattern={"v_proj": 5})


def test_what_equals_the_generator_s_is_accepted(generator_folder: Path, layout: AdapterLayout) -> None:
    targets = list(layout.target_modules or ())
    given = DnDConfig(generator=str(generator_folder), prompts=PROMPTS, r=3, target_modules=targets, lora_alpha=6)
    assert given == DnDConfig(generator=str(generator_folder), prompts=PROMPTS)
    assert (
        DnDConfig(generator=str(generator_folder), prompts=PROMPTS, lora_alpha=12).to_plain_config().lora_alpha == 12
    )


@pytest.mark.parametrize("given", [{"r": 4}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 4}}])
def test_what_contradicts_the_generator_is_refused(given: dict[str, object], generator_folder: Path) -> None:
    (name,) = given
    with pytest.raises(GeneratorConfigError, match=rf"got {name}=.*writes adapters with {name}="):
        DnDConfig(generator=str(generator_folder), prompts=PROMPTS, **given)  # type: ignore[arg-type]
    config = DnDConfig(generator=str(generator_folder), prompts=PROMPTS)
    setattr(config, name, given[name])
    with pytest.raises(GeneratorConfigError, match=rf"got {name}="):
        config.to_plain_config()


@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["q_proj"]},
        {"target_parameters": ["weight"]},
        {"layer_replication": [(0, 1)]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": False},
    ],
)
def test_what_no_generator_writes_is_refused(given: dict[str, object], generator_folder: Path) -> None:
    (name,) = given
    with pytest.raises(GeneratorConfigError, match=rf"got {name}="):
        DnDConfig(generator=str(generator_folder), prompts=PROMPTS, **given)  # type: ignore[arg-type]
    config = DnDConfig(generator=str(generator_folder), prompts=PROMPTS)
    setattr(config, name, given[name])
    with pytest.raises(GeneratorConfigError, match=rf"got {name}="):
        config.to_plain_config()


def test_every_field_of_peft_s_is_decided_upon(generator_folder: Path) -> None:
    # Fields that later PEFT versions add are refused unless left alone; this counts the ones that pass through.
    config = DnDConfig(
        generator=str(generator_folder),
        prompts=PROMPTS,
        lora_dropout=0.1,
        modules_to_save=["lm_head"],
        task_type=TaskType.FEATURE_EXTRACTION,
        inference_mode=True,
        revision="v1",
        base_model_name_or_path="org/base",
    )
    plain = config.to_plain_config()
    assert type(plain) is LoraConfig
    assert (plain.lora_dropout, plain.modules_to_save, plain.inference_mode) == (0.1, ["lm_head"], True)
    assert (plain.task_type, plain.revision, plain.base_model_name_or_path) == (
        "FEATURE_EXTRACTION",
        "v1",
        "org/base",
    )
    assert plain.modules_to_save is not config.modules_to_save
    assert plain.init_lora_weights is True


def test_bad_prompts_and_generators_are_refused_before_a_model_is_needed(generator_folder: Path) -> None:
    for prompts, error in (
        (None, GeneratorConfigError),
        ([], PromptError),
        ([""], PromptError),
        ("one string", PromptTypeError),
        ([1], PromptTypeError),
    ):
        with pytest.raises(error):
            DnDConfig(generator=str(generator_folder), prompts=prompts)  # type: ignore[arg-type]
    for generator in (None, "", 7):
        with pytest.raises(GeneratorConfigError, match="needs a generator"):
            DnDConfig(generator=generator, prompts=PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(GeneratorNotFoundError, match="no/where"):
        DnDConfig(generator="no/where", prompts=PROMPTS)
    with pytest.raises(GeneratorConfigError, match="seed"):
        DnDConfig(generator=str(generator_folder), prompts=PROMPTS, seed="0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prompt"):
        DnDConfig(generator=str(generator_folder), prompt=PROMPTS)  # type: ignore[call-arg]


def test_what_it_saves_is_plain_lora_without_a_prompt(generator_folder: Path, tmp_path: Path) -> None:
    config = DnDConfig(generator=str(generator_folder), prompts=PROMPTS)
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert not any(prompt in text for prompt in PROMPTS)
    assert str(generator_folder) not in text
    assert set(json.loads(text)) == set(LoraConfig().to_dict())
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig
    assert PeftConfig.from_pretrained(str(tmp_path)) == config.to_plain_config()
    assert not any(prompt in repr(config) for prompt in PROMPTS)


def test_copies_and_pickles_of_a_named_generator(generator_folder: Path) -> None:
    config = DnDConfig(generator=str(generator_folder), prompts=PROMPTS, lora_dropout=0.2, seed=5)
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
    ):
        assert other == config
        assert other.to_plain_config() == config.to_plain_config()
    assert dataclasses.replace(config, seed=6).seed == 6
    assert dataclasses.asdict(config)["generator"] == str(generator_folder)


def test_a_live_generator_is_shared_by_copies_and_not_pickled(generator: PromptConditionedLoraGenerator) -> None:
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    for other in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config, seed=3)):
        assert other.generator.model is generator  # type: ignore[union-attr]
    assert copy.deepcopy(config) == config
    assert dataclasses.asdict(config)["generator"].model is generator
    with pytest.raises(GeneratorConfigError, match="save_pretrained"):
        pickle.dumps(config)
    with pytest.raises(GeneratorConfigError, match="generator_revision"):
        DnDConfig(generator=generator, generator_revision="v1", prompts=PROMPTS)
    assert "live PromptConditionedLoraGenerator" in repr(config)
    json.dumps({key: value for key, value in config.to_dict().items() if key != "target_modules"})


def test_copies_do_not_follow_what_happens_to_the_original(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase
) -> None:
    config = DnDConfig(generator=generator, prompts=PROMPTS)
    model = get_peft_model(fresh_base(), config)
    for other in (copy.copy(config), copy.deepcopy(config)):
        other.modules_to_save = ["lm_head"]
    assert model.peft_config["default"].modules_to_save is None
    config.modules_to_save = ["lm_head"]
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
