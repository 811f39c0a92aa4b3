# SPDX-License-Identifier: Apache-2.0
"""The folder of a generator of several bases, damaged, served, and on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.several_bases import PROMPTS, base_of
from torch import nn

from peft_dnd import (
    PromptConditionedLoraGenerator,
    StreamedLoraGenerator,
)
from peft_dnd.cli.app import main
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
)
from peft_dnd.generator import renew_checksums


pytest_plugins = ("support.several_bases",)


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


def test_the_command_line(
    folder: Path, bases: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    given = ["generate", str(folder), str(tmp_path / "prompts.txt"), str(tmp_path / "adapter")]
    assert main([*given, "--base", "wide", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["base_model"] == "org/wide"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for wrong, words in (([], "3 bases"), (["--base", "wid"], "Known: 'small-1.5', 'deep', 'wide'")):
        assert main([*given[:3], str(tmp_path / "none"), *wrong]) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()

    assert main(["inspect", str(folder)]) == 0
    assert "org/deep" in capsys.readouterr().out
    bases["org/wide"].save_pretrained(tmp_path / "wide")
    assert main(["inspect", str(folder), "--base", str(tmp_path / "wide"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits_base"] is True
    assert set(facts["bases"]) == {"small-1.5", "wide", "deep"}
    base_of("other", (48, 1)).save_pretrained(tmp_path / "other")
    assert main(["inspect", str(folder), "--base", str(tmp_path / "other")]) == 1
    assert "is none of its bases" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--against", str(tmp_path / "adapter")]) == 1
    assert "say by --base" in capsys.readouterr().out
