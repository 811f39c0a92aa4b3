# SPDX-License-Identifier: Apache-2.0
"""A newcomer's mistakes are answered by the library's own errors, which name what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from peft_dnd import (
    DnDConfig,
    DnDTrainer,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
    select_representative,
)
from peft_dnd.errors import (
    BaseModelMismatchError,
    CorruptFileError,
    DestinationError,
    GeneratorConfigError,
    GeneratorNotFoundError,
    LayoutError,
    MissingFileError,
    PairsFolderError,
    PromptError,
    PromptTypeError,
    TextEncoderError,
)
from peft_dnd.storage.files import read_safetensors, write_safetensors
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


PROMPTS = ["what is the law ?", "a court please"]
LOADERS = [PromptConditionedLoraGenerator, StreamedLoraGenerator]


@pytest.fixture
def copied(generator_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generator_folder, tmp_path / "generator"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [None, "", 3])
def test_what_is_no_name(loader: Any, name: Any) -> None:
    with pytest.raises(GeneratorNotFoundError, match="a string; got"):
        loader.from_pretrained(name)
    with pytest.raises(GeneratorNotFoundError, match="a string; got"):
        PromptConditionedLoraGeneratorConfig.from_pretrained(name)


def test_a_file_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("file", "it is a file"), ("typo", "no such folder")):
        with pytest.raises(GeneratorNotFoundError, match=words):
            PromptConditionedLoraGenerator.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    "read", [PromptConditionedLoraGenerator.from_pretrained, PromptConditionedLoraGeneratorConfig.from_pretrained]
)
def test_other_kinds_of_folders_are_told_apart(
    read: Any, generator: PromptConditionedLoraGenerator, pairs_folder: Path, tmp_path: Path
) -> None:
    generator.generate_adapter(PROMPTS).save_pretrained(tmp_path / "adapter")
    with pytest.raises(GeneratorNotFoundError, match="holds an adapter"):
        read(tmp_path / "adapter")
    with pytest.raises(GeneratorNotFoundError, match="holds pairs"):
        read(pairs_folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_configuration(loader: Any, copied: Path) -> None:
    path = copied / "config.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        loader.from_pretrained(copied)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(GeneratorNotFoundError, match="no generator"):
        loader.from_pretrained(copied)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["format_version", "decoder_config", "measured"])
def test_a_value_of_the_wrong_kind(loader: Any, copied: Path, name: str) -> None:
    edit(copied, **{name: "x"})
    with pytest.raises(GeneratorConfigError, match=f"{name}.*'x'"):
        loader.from_pretrained(copied)


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_do_not_fit_the_configuration(loader: Any, copied: Path) -> None:
    tensors = read_safetensors(copied / "model.safetensors")
    key = next(key for key in tensors if key.startswith("decoder.") and tensors[key].ndim > 1)
    write_safetensors(copied / "model.safetensors", tensors | {key: tensors[key][1:]})
    with pytest.raises(CorruptFileError, match="mismatched keys"):
        loader.from_pretrained(copied)


@pytest.mark.parametrize("loader", LOADERS)
def test_dtypes_by_name(loader: Any, generator_folder: Path) -> None:
    assert loader.from_pretrained(generator_folder, dtype="bfloat16").dtype == torch.bfloat16
    for dtype in ("bfloat17", "int8", torch.int8):
        with pytest.raises(GeneratorConfigError, match="floating-point"):
            loader.from_pretrained(generator_folder, dtype=dtype)


def test_a_device_that_is_not_there(generator_folder: Path) -> None:
    with pytest.raises(GeneratorConfigError, match="'gpuu' cannot be used"):
        StreamedLoraGenerator.from_pretrained(generator_folder, device="gpuu")


def test_a_name_in_place_of_a_text_encoder(
    generator_folder: Path, generator: PromptConditionedLoraGenerator, encoder_folder: Path
) -> None:
    for loader in LOADERS:
        with pytest.raises(TextEncoderError, match="loaded text encoder"):
            loader.from_pretrained(generator_folder, text_encoder=str(encoder_folder))
    with pytest.raises(TextEncoderError, match="loaded text encoder"):
        PromptConditionedLoraGenerator(generator.config, text_encoder="encoder")  # type: ignore[arg-type]
    with pytest.raises(TextEncoderError, match="loaded text encoder"):
        select_representative(PROMPTS, 1, "encoder")  # type: ignore[arg-type]
    with pytest.raises(TextEncoderError, match="loaded text encoder"):
        PromptConditionedLoraGeneratorConfig.from_adapters(generator.config.adapter_layout, None)  # type: ignore[arg-type]
    with pytest.raises(GeneratorConfigError, match="from_folder"):
        PromptConditionedLoraGeneratorConfig.from_adapters("pairs", generator.text_encoder)  # type: ignore[arg-type]


def test_what_is_no_text_encoder(generator_folder: Path, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TextEncoderError, match="is a generator"):
        SentenceTransformerTextEncoder.from_pretrained(generator_folder)
    (tmp_path / "words.txt").write_text("law", encoding="utf-8")
    with pytest.raises(TextEncoderError, match="has no number"):
        SentenceTransformerTextEncoder.from_word_vectors(tmp_path / "words.txt")
    for options in ({"layer": "x"}, {"window_tokens": "5"}):
        with pytest.raises(GeneratorConfigError, match=r"'[x5]'"):
            SentenceTransformerTextEncoder.from_pretrained(encoder_folder, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seed": "1"}, "seed"), ({"seed": None}, "seed"), ({"seed": 1.5}, "seed"), ({"threshold": "x"}, "threshold")],
)
def test_numbers_that_are_none(generator: PromptConditionedLoraGenerator, options: Any, words: str) -> None:
    with pytest.raises(GeneratorConfigError, match=words):
        generator.generate_adapter(PROMPTS, **options)


def test_many_tasks_that_are_no_dictionary(generator: PromptConditionedLoraGenerator) -> None:
    with pytest.raises(PromptTypeError, match="got a list"):
        generator.generate_adapters(PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"answers for task 'Law'.*'law'"):
        generator.generate_adapters({"law": PROMPTS}, answers={"Law": PROMPTS})


def test_what_no_adapter_can_be_put_into(
    generator: PromptConditionedLoraGenerator, fresh_base: Callable[[], nn.Module]
) -> None:
    adapter = generator.generate_adapter(PROMPTS)
    with pytest.raises(BaseModelMismatchError, match=r"'base'.*Load the base"):
        adapter.load_into("base")  # type: ignore[arg-type]
    for name in ("law.one", "", 3):
        with pytest.raises(LayoutError, match="adapter's name"):
            adapter.load_into(fresh_base(), name)  # type: ignore[arg-type]


def test_alpha_is_a_number(generator: PromptConditionedLoraGenerator) -> None:
    with pytest.raises(GeneratorConfigError, match=r"lora_alpha.*'x'"):
        DnDConfig(generator=generator, prompts=PROMPTS, lora_alpha="x")  # type: ignore[arg-type]


def test_a_file_in_the_way_and_a_folder_without_files(
    generator: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for target in ("file", "file/adapter", "file/deep/adapter"):
        with pytest.raises(DestinationError, match="is a file"):
            generator.generate_adapter(PROMPTS).save_pretrained(tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for model in (generator, generator.text_encoder, generator.generate_adapter(PROMPTS)):
        for nowhere in ("", None):
            with pytest.raises(DestinationError, match="needs a place"):
                model.save_pretrained(nowhere)
    with pytest.raises(MissingFileError, match="nowhere"):
        GeneratedAdapter.from_pretrained(tmp_path / "nowhere")


def test_other_kinds_of_folders_are_no_pairs(generator_folder: Path, pairs_folder: Path) -> None:
    with pytest.raises(PairsFolderError, match="no pairs folder") as caught:
        PromptCheckpointDataset.from_folder(generator_folder)
    assert "remove" not in str(caught.value)
    with pytest.raises(PairsFolderError, match="tasks is empty"):
        PromptCheckpointDataset.from_folder(pairs_folder, tasks=[])
    for nothing in (None, "", 3):
        with pytest.raises(PairsFolderError, match="named by a string"):
            PromptCheckpointDataset.from_folder(nothing)  # type: ignore[arg-type]
    for tasks in ([1], 3, [["law"]], [None]):
        with pytest.raises(PairsFolderError, match="named by strings"):
            PromptCheckpointDataset.from_folder(pairs_folder, tasks=tasks)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="must be an AdapterLayout"):
        PromptCheckpointDataset.from_folder(pairs_folder, layout="x")  # type: ignore[arg-type]


def test_what_pairs_cannot_be_split_by(pairs: PromptCheckpointDataset) -> None:
    for names in (None, 3, 0.5, [["law"]], [{}]):
        with pytest.raises(PairsFolderError, match="named by strings"):
            pairs.split(names)  # type: ignore[arg-type]
    for names in ("typo", ["law", "typo"]):
        with pytest.raises(PairsFolderError, match=r"no task 'typo'.*'law'"):
            pairs.split(names)
    for names in ([], pairs.tasks):
        with pytest.raises(PairsFolderError, match="one of the two parts empty"):
            pairs.split(names)
    with pytest.raises(PairsFolderError, match="no task"):
        pairs.prompts(["law"])  # type: ignore[arg-type]


def test_a_checkpoint_that_is_no_lora_names_its_file(pairs_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pairs_folder, tmp_path / "pairs"))
    last = max(next(path for path in sorted(copied.glob("*/checkpoints"))).iterdir())
    tensors = read_safetensors(last)
    key = next(key for key in tensors if "lora_A" in key)
    write_safetensors(last, tensors | {key: tensors[key][:1]})
    with pytest.raises(LayoutError, match=last.name):
        PromptCheckpointDataset.from_folder(copied)


def test_what_a_trainer_cannot_take(
    generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, tmp_path: Path
) -> None:
    with pytest.raises(GeneratorConfigError, match="got 'generator'"):
        DnDTrainer("generator", train_dataset=pairs)  # type: ignore[arg-type]
    with pytest.raises(GeneratorConfigError, match="got TrainingArguments"):
        DnDTrainer(generator, TrainingArguments(str(tmp_path)), train_dataset=pairs)  # type: ignore[arg-type]
    with pytest.raises(PairsFolderError, match="from_folder"):
        DnDTrainer(generator, train_dataset="pairs")  # type: ignore[arg-type]
