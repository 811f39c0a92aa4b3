# SPDX-License-Identifier: Apache-2.0
"""A generator of several bases whose folder was damaged, or edited on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.constants import TASK_PROMPTS
from support.several_bases import SIZES, base_of, layouts_of, make

from peft_dnd import PromptConditionedLoraGenerator, StreamedLoraGenerator
from peft_dnd.errors import CorruptFileError, GeneratorConfigError
from peft_dnd.generator import renew_checksums


PROMPTS = TASK_PROMPTS["law"]


@pytest.fixture(scope="module")
def folder(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "generator"
    make(layouts_of({name: base_of(name) for name in SIZES}), encoder_folder).save_pretrained(folder)
    return folder


def edited(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]] = {
    "a head's tensor is missing": lambda t, c: t.pop("heads.wide.writer.slots"),
    "a head is missing": lambda t, c: [t.pop(key) for key in list(t) if key.startswith("heads.wide.")],
    "two heads' tensors are swapped": lambda t, c: swap(
        t, "heads.wide.writer.templates", "heads.deep.writer.templates"
    ),
    "a scale is negative": lambda t, c: t["heads.deep.normalization.scale"].neg_(),
    "a base is forgotten": lambda t, c: c["bases"].pop("wide"),
    "a base is renamed": lambda t, c: c["bases"].update(other=c["bases"].pop("wide")),
    "a base has another layout": lambda t, c: c["bases"]["wide"].update(layout=c["bases"]["deep"]["layout"]),
    "alpha is another": lambda t, c: [module.__setitem__(4, 99) for module in c["bases"]["wide"]["layout"]["modules"]],
    "a base is no dictionary": lambda t, c: c["bases"].update(wide=3),
    "bases are a list": lambda t, c: c.update(bases=["wide"]),
    "the format is newer": lambda t, c: c.update(format_version=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage: str, folder: Path, tmp_path: Path) -> None:
    target = edited(folder, tmp_path / "damaged", DAMAGES[damage])
    for kind in (PromptConditionedLoraGenerator, StreamedLoraGenerator):
        with pytest.raises((CorruptFileError, GeneratorConfigError, ValueError)):
            loaded: Any = kind.from_pretrained(target)
            for name in loaded.config.base_names:
                loaded.generate_adapter(PROMPTS, base=name)


def test_an_edit_on_purpose_is_accepted_when_the_checksums_are_renewed(folder: Path, tmp_path: Path) -> None:
    target = edited(folder, tmp_path / "edited", DAMAGES["alpha is another"])
    renew_checksums(target)
    loaded = PromptConditionedLoraGenerator.from_pretrained(target)
    assert {module.alpha for module in loaded.config.layouts["wide"].modules} == {99}


def test_a_server_takes_the_generator_of_one_base(folder: Path) -> None:
    from peft_dnd.serving.generators import load_served_generator

    with pytest.raises(GeneratorConfigError, match=r"3 bases.*saved to a folder of its own"):
        load_served_generator("several", str(folder))
