# SPDX-License-Identifier: Apache-2.0
"""The generator: repeatable, self-contained when asked, and never silently wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from peft_dnd import (
    AdapterLayout,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.errors import (
    CorruptFileError,
    FormatVersionError,
    GeneratorConfigError,
    GeneratorNotFoundError,
    NotFittedError,
    PromptError,
    PromptTypeError,
    TextEncoderError,
    WeightValueError,
)


PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please", "law ."]
OTHERS = ["what is the capital ?", "the river please", "what is a river ?"]


def same(first: GeneratedAdapter, second: GeneratedAdapter) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_same_bytes_every_time_alone_or_among_others(generator: PromptConditionedLoraGenerator) -> None:
    alone = generator.generate_adapter(PROMPTS)
    assert same(alone, generator.generate_adapter(PROMPTS))
    tasks = {"geo": OTHERS, "law": PROMPTS, "long": ["what is the colour ? " * 30, "court"], "one": ["river"]}
    together = generator.generate_adapter(tasks)
    assert list(together) == list(tasks)
    assert same(alone, together["law"])
    assert all(same(generator.generate_adapter(prompts), together[task]) for task, prompts in tasks.items())
    assert not same(together["law"], together["geo"])


def test_adapter_is_the_mean_plus_what_is_decoded(generator: PromptConditionedLoraGenerator) -> None:
    states, mask = generator.encode_prompts(PROMPTS)
    with torch.no_grad():
        tokens = generator(states[None], mask[None])[0]
    normalization = generator.normalization
    grid = tokens * normalization.scale[:, None, None] + normalization.mean
    expected = generator.weight_tokenizer.decode(grid)
    found = generator.generate_adapter(PROMPTS).state_dict()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


def test_unfitted_decoder_writes_the_mean_adapter(generator_config: PromptConditionedLoraGeneratorConfig) -> None:
    settings = {
        **generator_config.to_dict(),
        "decoder_type": "hyper_convolution",
        "decoder_config": {"kernel_size": 3},
    }
    model = PromptConditionedLoraGenerator(PromptConditionedLoraGeneratorConfig.from_dict(settings))
    with pytest.raises(NotFittedError, match="never been fitted"):
        model.generate_adapter(PROMPTS)
    mean = torch.randn(model.weight_tokenizer.grid_shape)
    model.normalization.set_statistics(mean, torch.ones(len(mean)))
    found = model.generate_adapter(PROMPTS).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.weight_tokenizer.decode(mean).items())


def test_seed_decides_only_where_there_is_a_choice(generator: PromptConditionedLoraGenerator) -> None:
    many = [f"what is a {word} ?" for word in ("law", "court", "tax", "river", "doctor", "colour", "capital")]
    assert not same(generator.generate_adapter(many, seed=0), generator.generate_adapter(many, seed=1))
    exactly = many[: generator.config.num_prompts]
    assert same(generator.generate_adapter(exactly, seed=0), generator.generate_adapter(exactly, seed=1))


@pytest.mark.parametrize(
    "prompts",
    [
        ["court"],
        ["what is a river ?"] * 10_000,
        ["the law " * 5000, "court"],
        ["什么是法律？", "Что такое закон?", "ما هو القانون؟", "⚖️👩‍⚖️🏛️", "🤷"],
        ["\x00\x01", "\u200b.", "a\nb\tc"],
    ],
    ids=["one", "ten thousand", "very long", "other scripts and emoji", "control characters"],
)
def test_unusual_prompts_work(generator: PromptConditionedLoraGenerator, prompts: list[str]) -> None:
    adapter = generator.generate_adapter(prompts)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.state_dict().values())


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([], PromptError, "empty"),
        (["law", ""], PromptError, r"\[1\]"),
        (["law", "  \n"], PromptError, r"\[1\]"),
        (["law", 3], PromptTypeError, r"\[1\].*int"),
        ("law", PromptTypeError, "list"),
        (None, PromptTypeError, "NoneType"),
        ({"law": ["a"], "med": []}, PromptError, "med"),
    ],
)
def test_bad_prompts_are_named(
    generator: PromptConditionedLoraGenerator, prompts: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        generator.generate_adapter(prompts)


def test_provenance_tells_where_it_is_from_but_no_prompt(generator_folder: Path) -> None:
    adapter = PromptConditionedLoraGenerator.from_pretrained(generator_folder).generate_adapter(PROMPTS, seed=3)
    assert adapter.provenance["generator"] == str(generator_folder)
    assert adapter.provenance["seed"] == 3
    assert adapter.provenance["num_prompts"] == len(PROMPTS)
    assert not any(prompt in json.dumps(dict(adapter.provenance)) for prompt in PROMPTS)


def test_saved_and_loaded_by_every_door(
    generator: PromptConditionedLoraGenerator, generator_folder: Path, tmp_path: Path
) -> None:
    expected = generator.generate_adapter(PROMPTS)
    for load in (PromptConditionedLoraGenerator, AutoModel):
        assert same(load.from_pretrained(generator_folder).generate_adapter(PROMPTS), expected)
    config = AutoConfig.from_pretrained(generator_folder)
    assert config.adapter_layout == generator.config.adapter_layout
    assert same(
        PromptConditionedLoraGenerator.from_pretrained(generator_folder, device_map="cpu").generate_adapter(PROMPTS),
        expected,
    )
    nested = tmp_path / "repository"
    generator.save_pretrained(nested / "inside")
    again = PromptConditionedLoraGenerator.from_pretrained(nested, subfolder="inside")
    assert same(again.generate_adapter(PROMPTS), expected)


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_bfloat16_decodes_close_by_and_keeps_the_statistics_exact(
    generator: PromptConditionedLoraGenerator, generator_folder: Path, keyword: str
) -> None:
    half = PromptConditionedLoraGenerator.from_pretrained(generator_folder, **{keyword: torch.bfloat16})
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.normalization.mean, generator.normalization.mean)
    whole = generator.generate_adapter(PROMPTS).state_dict()
    for key, tensor in half.generate_adapter(PROMPTS).state_dict().items():
        assert tensor.dtype == torch.float32
        assert (tensor - whole[key]).norm() < 0.05 * whole[key].norm()


def test_shards_and_what_an_earlier_save_left(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    expected = generator.generate_adapter(PROMPTS)
    generator.save_pretrained(tmp_path)
    generator.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same(PromptConditionedLoraGenerator.from_pretrained(tmp_path).generate_adapter(PROMPTS), expected)
    generator.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert not list(tmp_path.parent.glob(".peft_dnd_staging*"))


def test_carries_its_text_encoder_when_asked(
    generator: PromptConditionedLoraGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.save_pretrained(tmp_path / "with", include_text_encoder=True)
    generator.save_pretrained(tmp_path / "without")
    assert not generator.config.text_encoder_in_folder
    assert not (tmp_path / "without" / "text_encoder").exists()

    (tmp_path / "with").rename(tmp_path / "moved")
    moved = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "moved")
    moved.config.text_encoder = "nobody/no-such-encoder"
    assert same(moved.generate_adapter(PROMPTS), generator.generate_adapter(PROMPTS))

    elsewhere = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "without")
    elsewhere.config.text_encoder = str(tmp_path / "typo")
    with pytest.raises(TextEncoderError, match="typo"):
        elsewhere.generate_adapter(PROMPTS)
    given = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "without", text_encoder=generator.text_encoder)
    assert given.text_encoder is generator.text_encoder


def test_encoder_of_another_width_is_refused(
    generator_config: PromptConditionedLoraGeneratorConfig, generator: PromptConditionedLoraGenerator
) -> None:
    wide = PromptConditionedLoraGeneratorConfig.from_dict(
        {**generator_config.to_dict(), "condition_size": 20, "decoder_config": {"kernel_size": 3}}
    )
    model = PromptConditionedLoraGenerator(wide, text_encoder=generator.text_encoder)
    with pytest.raises(TextEncoderError, match=r"16.*20"):
        model.load_text_encoder()


def test_sentence_embeddings_as_condition(layout: AdapterLayout, encoder_folder: Path) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout, str(encoder_folder), condition="sentence_embeddings", num_prompts=3, decoder_type="hyper_convolution"
    )
    assert config.condition_shape == (3, 1, 16)
    model = PromptConditionedLoraGenerator(config)
    states, mask = model.encode_prompts(OTHERS)
    assert torch.equal(states[:, 0], model.text_encoder.encode_sentences(OTHERS))
    assert mask.all()


def test_padding_is_no_content(generator: PromptConditionedLoraGenerator) -> None:
    states, mask = generator.encode_prompts(OTHERS)
    assert not mask.all()
    noisy = torch.where(mask[..., None], states, 1e6)
    with torch.no_grad():
        assert torch.equal(generator(states[None], mask[None]), generator(noisy[None], mask[None]))


def test_what_was_derived_is_written_down(generator_folder: Path) -> None:
    saved = json.loads((generator_folder / "config.json").read_text())
    assert saved["chunk_width"] > 0
    assert saved["decoder_config"]["cascade"][0] == [4, 16, 16]


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_folder_problems_are_named(generator_folder: Path, tmp_path: Path) -> None:
    load = PromptConditionedLoraGenerator.from_pretrained
    with pytest.raises(GeneratorNotFoundError, match="typo"):
        load(tmp_path / "typo")
    with pytest.raises(GeneratorNotFoundError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(GeneratorNotFoundError, match="llama"):
        load(edited(generator_folder, tmp_path / "other", model_type="llama"))
    with pytest.raises(FormatVersionError, match=r"99.*pip install --upgrade"):
        load(edited(generator_folder, tmp_path / "newer", format_version=99))

    truncated = edited(generator_folder, tmp_path / "truncated")
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match="truncated"):
        load(truncated)

    broken = edited(generator_folder, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": ')
    with pytest.raises(CorruptFileError, match="broken"):
        load(broken)

    bare = edited(generator_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(GeneratorNotFoundError, match="bare"):
        load(bare)


def test_weights_that_do_not_belong_are_refused(generator_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = edited(generator_folder, tmp_path / "edited")
    # Cloned: the file is mapped into memory, and overwritten below.
    weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    name = next(name for name in weights if name.startswith("decoder"))
    for change in (
        {key: tensor for key, tensor in weights.items() if key != name},
        {**weights, "decoder.typo": torch.zeros(1)},
    ):
        save_file(change, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptFileError, match=r"decoder\."):
            PromptConditionedLoraGenerator.from_pretrained(folder)


def test_damaged_generator_never_writes_nan(generator_folder: Path) -> None:
    model = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(WeightValueError, match="NaN"):
        model.generate_adapter(PROMPTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"max_prompt_length": -1}, "max_prompt_length"),
        ({"condition": "smell"}, "condition"),
        ({"normalization": "batch"}, "normalization"),
        ({"condition": "sentence_embeddings", "max_prompt_length": 5}, "must be 1"),
        ({"num_promts": 4}, "num_prompts"),
        ({"text_encodr": "x"}, "text_encoder"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GeneratorConfigError, match=words):
        PromptConditionedLoraGeneratorConfig(**changes)


def test_typo_in_decoder_settings(layout: AdapterLayout, encoder_folder: Path) -> None:
    for settings, words in (({"kernel_sise": 3}, "kernel_sise"), ({"kernel_size": 4}, "odd")):
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            layout, str(encoder_folder), decoder_type="hyper_convolution", decoder_config=settings
        )
        with pytest.raises(GeneratorConfigError, match=words):
            PromptConditionedLoraGenerator(config)
    with pytest.raises(GeneratorConfigError, match="no adapter layout"):
        PromptConditionedLoraGenerator(PromptConditionedLoraGeneratorConfig())


def test_kill_in_mid_write_leaves_the_good_generator(generator_folder: Path, tmp_path: Path) -> None:
    folder = edited(generator_folder, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = f"""
import os, signal
import safetensors.torch, transformers.modeling_utils
from peft_dnd import PromptConditionedLoraGenerator
model = PromptConditionedLoraGenerator.from_pretrained({str(folder)!r})
def save(tensors, filename, metadata=None):
    with open(filename, "wb") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
transformers.modeling_utils.safe_save_file = save
model.save_pretrained({str(folder)!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_full_disk_leaves_the_good_generator(
    generator: PromptConditionedLoraGenerator,
    generator_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = edited(generator_folder, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        generator.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["good"]


def test_own_card_is_kept(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "library_name: peft_dnd" in card.read_text()
    card.write_text("mine")
    generator.save_pretrained(tmp_path)
    assert card.read_text() == "mine"


@pytest.mark.gpu
def test_moves_to_a_gpu_and_back(
    generator: PromptConditionedLoraGenerator, fresh_base: Callable[[], nn.Module]
) -> None:
    expected = generator.generate_adapter(PROMPTS).state_dict()
    found = generator.to("cuda").generate_adapter(PROMPTS).state_dict()
    generator.to("cpu")
    assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)
