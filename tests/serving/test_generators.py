# SPDX-License-Identifier: Apache-2.0
"""Generators as they are loaded to be served: their hash, their text encoder's, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.errors import GeneratorConfigError, GeneratorNotFoundError, NotFittedError
from peft_dnd.serving import TaskPrompts, load_served_generator
from peft_dnd.serving.generators import folder_hash


SOURCE = TaskPrompts(("what is the law ?",))


def test_an_id_depends_on_every_file_of_the_generator_and_on_nothing_else(
    generator_folder: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "elsewhere"
    for place in (here, there):
        PromptConditionedLoraGenerator.from_pretrained(generator_folder).save_pretrained(
            place, include_text_encoder=True
        )
    one, other = load_served_generator("a", str(here)), load_served_generator("b", str(there))
    assert one.revision == other.revision and one.adapter_id(SOURCE) == other.adapter_id(SOURCE)
    assert one.text_encoder is None and one.generator.name_or_path == ""
    (there / "notes.txt").write_text("not read")
    assert folder_hash(there) == one.revision
    deepest = max((there / "text_encoder").rglob("*.safetensors"), key=lambda path: len(path.parts))
    for path in (there / "config.json", deepest):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert folder_hash(there) != one.revision
        path.write_bytes(before)
    assert folder_hash(there) == one.revision


def test_a_text_encoder_elsewhere_counts_too(generator_folder: Path, encoder_folder: Path, tmp_path: Path) -> None:
    served = load_served_generator("a", str(generator_folder))
    assert served.text_encoder == folder_hash(encoder_folder, ("*",))
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    assert folder_hash(tmp_path / "encoder", ("*",)) == served.text_encoder


def test_what_cannot_be_served_is_refused(generator_folder: Path, generator_config, tmp_path: Path) -> None:
    PromptConditionedLoraGenerator(generator_config).save_pretrained(tmp_path / "unfitted")
    for place, error in (("unfitted", NotFittedError), ("nothing", GeneratorNotFoundError)):
        with pytest.raises(error):
            load_served_generator("a", str(tmp_path / place))
    with pytest.raises(GeneratorConfigError, match=r"'\.\./a'"):
        load_served_generator("../a", str(generator_folder))
