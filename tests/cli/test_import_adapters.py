# SPDX-License-Identifier: Apache-2.0
"""`import-adapters` of adapters that exist already: lists, folders, options, and what is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.existing_adapters import make_adapter
from torch import nn

import peft_dnd.cli.adapter_lists
from peft_dnd import AdapterLayout, PromptCheckpointDataset


@pytest.fixture(scope="module")
def loras(base_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of other ranks and alphas, with cards."""
    folder = tmp_path_factory.mktemp("adapters") / "loras"
    make_adapter(base_model, folder / "law", 0, card="It answers questions of law in a word.")
    make_adapter(base_model, folder / "tax", 1, r=5, lora_alpha=40, card="Knows what is due, and says when.")
    return folder


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_list_in_yaml(run, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_dataset(name: str, column: str, answer_column: str, **which: Any) -> list[dict[str, str]]:
        assert (name, column, answer_column, which) == ("org/tax", "q", "a", {"config": None, "split": "test"})
        return [{"q": "what tax ?", "a": "none"}]

    monkeypatch.setattr(peft_dnd.cli.adapter_lists, "read_dataset", read_dataset)
    write(tmp_path, law_txt="what is law ?\na court please\n")
    write(
        tmp_path,
        list_yaml=f"""
law: {{adapter: {loras / "law"}, prompts: {tmp_path / "law.txt"}}}
tax:
  adapter: [{loras / "tax"}, {{adapter: {loras}, subfolder: law}}]
  prompts: {{dataset: org/tax, split: test, column: q, answer_column: a}}
card: {{adapter: {loras / "tax"}, prompts: card}}
""",
    )
    given = ("import-adapters", tmp_path / "list.yaml", tmp_path / "pairs", "--rank", 4)
    ran = run(*given, "--factors", "canonical", "--json")
    assert ran.code == 0, ran.err
    assert [(task["task"], task["written"]) for task in ran.facts["tasks"]] == [
        ("law", True),
        ("tax", True),
        ("card", True),
    ]
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert pairs.layout.max_rank == 4 and len(pairs.checkpoints("tax")) == 2
    assert pairs.prompts("law") == ("what is law ?", "a court please") and pairs.answers("law") is None
    assert pairs.prompts("tax") == ("what tax ?",) and pairs.answers("tax") == ("none",)
    assert pairs.prompts("card") == ("Knows what is due, and says when.",)
    ran = run(*given)
    assert "3 complete before" in ran.out and "rank 3 to 5 and scaling 2 to 8" in ran.out
    assert "by 2 of them: tax " in ran.out and "(most in model.layers." in ran.out


def test_a_folder_of_adapters_and_one_alone(run, loras: Path, tmp_path: Path) -> None:
    write(tmp_path, law_csv="q\nwhat is law ?\n")
    given = ("--prompts", f"law={tmp_path / 'law.csv'}", "--column", "q")
    ran = run("import-adapters", loras, tmp_path / "pairs", *given)
    assert ran.code == 1 and "'tax' has no prompts" in ran.err and "--prompts-from-card" in ran.err
    ran = run("import-adapters", loras, tmp_path / "pairs", *given, "--prompts-from-card")
    assert ran.code == 0 and "2 task(s) written" in ran.out and "Nothing of any update was lost" in ran.out
    assert (tmp_path / "pairs" / "initialization").is_dir()  # two adapters have no more inputs than a shared A holds
    whole = run("import-adapters", loras, tmp_path / "whole", *given, "--prompts-from-card", "--factors", "canonical")
    assert whole.code == 0 and not (tmp_path / "whole" / "initialization").exists()
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert pairs.prompts("law") == ("what is law ?",) and pairs.prompts("tax")[0].startswith("Knows")
    ran = run("import-adapters", loras / "law", tmp_path / "one", *given, "--like", tmp_path / "pairs", "-q")
    assert ran.code == 0 and ran.out == ""
    assert PromptCheckpointDataset.from_folder(tmp_path / "one").layout.difference(pairs.layout) is None
    ran = run("import-adapters", loras / "law", tmp_path / "kept", *given, "--factors", "kept")
    assert PromptCheckpointDataset.from_folder(tmp_path / "kept").layout.max_rank == 3
    assert AdapterLayout.from_folder(loras / "law").difference(pairs.layout) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("law: {adaptor: x}", "Did you mean 'adapter'"),
        ("law: {adapter: x, prompts: {dataset: y, colum: z}}", "Did you mean 'column'"),
        ("law: {adapter: x, prompts: {column: z}}", "a file or a dataset"),
        ("law: {adapter: x, prompts: typo.txt}", "typo.txt"),
        ("law: {adapter: x, revision: 123}", "'revision'.*in quotes"),
        ("law: {adapter: {subfolder: x}}", "'adapter'.*must be a text"),
        ("- x/law\n- y/law", "two entries for the task 'law'"),
        ("x", "must hold a list"),
        ("", "must hold a list"),
        ("{}", "no adapter"),
        ("a: [", "no YAML"),
    ],
)
def test_lists_that_are_wrong(run, tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, list_yaml=text)
    ran = run("import-adapters", tmp_path / "list.yaml", tmp_path / "pairs")
    assert ran.code == 1 and not (tmp_path / "pairs").exists()
    assert re.search(words, ran.err), ran.err


def test_wrong_use(run, loras: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    for arguments, code, words in (
        (("typo.yaml", pairs), 1, "typo.yaml"),
        (("typo.yam", pairs), 1, "does not exist"),
        ((tmp_path / "typo" / "x", pairs, "--prompts-from-card"), 1, "no adapter at"),
        ((write(tmp_path, law_txt="x") / "law.txt", pairs), 1, "no list of adapters"),
        ((tmp_path / "law.txt", pairs, "--prompts", "law"), 2, "TASK=FILE"),
        ((loras, pairs, "--prompts", f"laws={tmp_path / 'law.txt'}", "--prompts-from-card"), 1, "Did you mean 'law'"),
        ((loras, pairs, "--rank", 0), 2, "rank"),
        ((loras, pairs, "--rank", 2, "--like", loras / "law"), 2, "--like"),
        ((loras, pairs, "--missing-modules", "zero"), 2, "zeros"),
        ((loras, pairs, "--settings", "math-1.5b", "--rank", 2), 2, "--rank has no meaning"),
        ((loras, pairs, "--settings", "math-1.5b"), 2, "--prompts"),
        ((loras, pairs, "--prompts-from-card", "--base", "org/other"), 1, "org/base"),
    ):
        ran = run("import-adapters", *arguments)
        assert ran.code == code and words in ran.err, (arguments, ran)
        assert not pairs.exists()
