# SPDX-License-Identifier: Apache-2.0
"""`verify`: an adapter made again from its folder, by the command that saved it and after edits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


LINES = ["what is the law of the court ?", "a court please", "tax law ."]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


@pytest.fixture
def adapter(run, generator_folder, prompts, tmp_path: Path) -> Path:
    ran = run("generate", generator_folder, prompts, tmp_path / "adapter", "--json")
    assert ran.code == 0, ran.err
    return tmp_path / "adapter"


def test_what_generate_saved_is_verified_by_its_folder_alone(run, adapter, prompts) -> None:
    ran = run("verify", adapter, "--prompts", prompts)
    assert ran.code == 0, ran.err
    assert "weights: ok. All 28 tensors are the same" in ran.out and "is what its provenance says" in ran.out
    facts = run("verify", adapter, "--prompts", prompts, "--json").facts
    assert facts["passed"] and facts["largest_difference"] < min(facts["tolerances"].values())
    assert run("verify", adapter, "--prompts", prompts, "--quiet").out == ""


def test_an_edit_ends_with_1(run, adapter, prompts) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    key = sorted(weights)[0]
    weights[key].view(-1)[0] += 1e-4
    save_file(weights, path, metadata={"format": "pt"})
    ran = run("verify", adapter, "--prompts", prompts)
    assert ran.code == 1
    assert "weights: FAILED. 1 of 28 tensors are others" in ran.out and "is not what its provenance says" in ran.out
    assert run("verify", adapter, "--prompts", prompts, "--quiet").code == 1


def test_wrong_prompts_and_places(run, adapter, prompts, generator_folder, trained_like, tmp_path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(LINES[::-1]), encoding="utf-8")
    ran = run("verify", adapter, "--prompts", other)
    assert ran.code == 1 and "prompts: FAILED" in ran.out and "in the same order" in ran.out
    ran = run("verify", adapter, "--prompts", tmp_path / "prompt.txt")
    assert ran.code == 1 and "prompts.txt" in ran.err
    ran = run("verify", adapter, "--prompts", prompts, "--generator", tmp_path / "nowhere")
    assert ran.code == 1 and "nowhere" in ran.err
    # The generator has moved: the hash says that it is the same one.
    shutil.copytree(generator_folder, tmp_path / "moved")
    assert run("verify", adapter, "--prompts", prompts, "--generator", tmp_path / "moved").code == 0
    assert run("verify", adapter).code == 2
    trained_like(0).save_pretrained(tmp_path / "trained")
    ran = run("verify", tmp_path / "trained", "--prompts", prompts, "--generator", generator_folder)
    assert ran.code == 1 and "peft_dnd_provenance.json" in ran.err
