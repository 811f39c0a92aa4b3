# SPDX-License-Identifier: Apache-2.0
"""The paper's settings: data that a configuration is built from, with the published sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from peft_dnd import (
    AdapterLayout,
    DnDTrainingArguments,
    PaperSettings,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    available_settings,
)
from peft_dnd.errors import CorruptFileError, GeneratorConfigError


# As published: of the cascade alone, of the length projection, and numbers in an adapter.
PARAMETERS = {
    "common-sense-0.5b": (1_113_203_220, 0, 4_399_104),
    "math-1.5b": (1_775_333_308, 5_610_000, 18_464_768),
    "coding-1.5b": (1_715_308_236, 27_626_000, 18_464_768),
    "math-7b": (1_936_520_220, 5_610_000, 40_370_176),
    "coding-7b": (1_936_520_220, 27_626_000, 40_370_176),
    "vl-3b": (2_409_631_548, 0, 29_933_568),
}


def test_these_are_all() -> None:
    assert set(available_settings()) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_sizes(name: str) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_settings(name)
    with torch.device("meta"):
        decoder = PromptConditionedLoraGenerator(config).decoder
    cascade, projection, adapter = PARAMETERS[name]
    assert sum(parameter.numel() for parameter in decoder.layers.parameters()) == cascade
    assert sum(parameter.numel() for parameter in decoder.parameters()) == cascade + projection
    assert config.adapter_layout.num_parameters == adapter
    rank = config.adapter_layout.max_rank
    assert config.weight_tokenizer().grid_shape[1:] == (rank + 2, config.chunk_width + 2)
    assert config.base_model_name_or_path == PaperSettings.load(name).base_model


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_optimiser_settings_are_arguments(name: str) -> None:
    training = PaperSettings.load(name).training
    assert set(training) <= {field.name for field in dataclasses.fields(DnDTrainingArguments)}
    assert (training["learning_rate"], training["weight_decay"], training["lr_scheduler_type"]) == (
        3e-5,
        0.1,
        "cosine",
    )


def test_vision_language_base_is_adapted_in_its_language_layers_alone() -> None:
    settings = PaperSettings.load("vl-3b")
    names = [module.name for module in settings.layout().modules]
    assert len(names) == 36 * 7
    assert all("language_model.layers" in name for name in names)
    projections = {name.rpartition(".")[2] for name, _ in settings.base_skeleton().named_modules() if "visual" in name}
    assert "gate_proj" in projections  # the vision tower has some of that name


def test_overrides_and_another_layout(layout: AdapterLayout) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_settings(
        "common-sense-0.5b",
        text_encoder="here",
        max_prompt_length=16,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3},
    )
    assert (config.text_encoder, config.condition_shape) == ("here", (128, 16, 384))
    config = PromptConditionedLoraGeneratorConfig.from_settings(
        "common-sense-0.5b", layout, token_format="chunks", chunk_width=8, decoder_config={}
    )
    assert config.adapter_layout == layout


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("common_sense-0.5b", {}, "Did you mean 'common-sense-0.5b'"),
        ("math-15b", {}, "Did you mean 'math-1.5b'"),
        ("something else", {}, "Known: 'coding-1.5b'"),
        ("missing.json", {}, "no settings file"),
        ("math-1.5b", {"num_prompt": 3}, "Did you mean 'num_prompts'"),
        ("math-1.5b", {"colour": 3}, "Unknown setting 'colour'"),
        ("math-1.5b", {"num_prompts": 0}, "positive"),
    ],
)
def test_typos_are_named(name: str, overrides: dict[str, int], words: str) -> None:
    with pytest.raises(GeneratorConfigError, match=words):
        PromptConditionedLoraGeneratorConfig.from_settings(name, **overrides)


def test_files_of_ones_own(tmp_path: Path) -> None:
    data = dataclasses.asdict(PaperSettings.load("common-sense-0.5b"))
    del data["name"]
    data["base_config"]["num_hidden_layers"] = 2
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    settings = PaperSettings.load(path)
    assert settings.name == "mine"
    assert len(settings.layout().modules) == 14
    for change, words in ({"lora": None}, "lacks 'lora'"), ({"steps": 3}, "unknown field 'steps'"):
        altered = {**data, **change}
        path.write_text(json.dumps({k: v for k, v in altered.items() if v is not None}), encoding="utf-8")
        with pytest.raises(GeneratorConfigError, match=words):
            PaperSettings.load(path)
    path.write_text(json.dumps({**data, "base_config": {"architectures": ["NoModel"]}}), encoding="utf-8")
    with pytest.raises(GeneratorConfigError, match="'NoModel'"):
        PaperSettings.load(path).base_skeleton()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CorruptFileError, match="JSON"):
        PaperSettings.load(path)
