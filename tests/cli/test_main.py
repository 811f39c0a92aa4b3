# SPDX-License-Identifier: Apache-2.0
"""The command: an adapter from the shell, and clear words when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator, __version__
from peft_dnd.cli.main import main


def test_generates_the_same_as_in_python(
    generator: PromptConditionedLoraGenerator, generator_folder: Path, tmp_path: Path
) -> None:
    prompts = ["what is the law ?", "a court please"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "", ""]), encoding="utf-8")
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = generator.generate_adapter(prompts).state_dict()
    for name in ("prompts.txt", "prompts.jsonl"):
        assert main(["generate", str(generator_folder), str(tmp_path / name), str(tmp_path / name[-4:])]) == 0
        found = GeneratedAdapter.from_pretrained(tmp_path / name[-4:]).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shows_what_a_generator_is(
    generator: PromptConditionedLoraGenerator, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(generator_folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapter_parameters"] == generator.config.adapter_layout.num_parameters
    assert facts["num_prompts"] == 4


@pytest.mark.parametrize(
    ("content", "words"), [(None, "prompts.jsonl"), ("", "empty"), ("{", "one prompt a line"), ("[1]", "prompt")]
)
def test_bad_input_is_named_and_nothing_written(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert main(["generate", str(generator_folder), str(path), str(tmp_path / "adapter")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_wrong_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "typo")]) == 1
    assert "typo" in capsys.readouterr().err


def test_a_decoder_that_is_not_here_is_not_shown_as_if_it_were(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((generator_folder / "config.json").read_text(encoding="utf-8"))
    for decoder_type in ("of_tomorrow", ["x"]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_type": decoder_type}), encoding="utf-8")
        assert main(["show", str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert f"Unknown decoder_type {decoder_type!r}" in shown.err and "upgrade" in shown.err and not shown.out


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert __version__ in capsys.readouterr().out
    for arguments in ([], ["generat"], ["generate"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_in_another_encoding_are_named(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes("the café".encode("latin-1"))
    assert main(["generate", str(generator_folder), str(tmp_path / name), str(tmp_path / "adapter")]) == 1
    found = capsys.readouterr().err
    assert name in found and "UTF-8" in found
    assert not (tmp_path / "adapter").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(generator_folder: Path, tmp_path: Path) -> None:
    written = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "prompts.txt").write_text("what is the law ?", encoding=encoding)
        assert main(["generate", str(generator_folder), str(tmp_path / "prompts.txt"), str(tmp_path / "adapter")]) == 0
        written.append(GeneratedAdapter.from_pretrained(tmp_path / "adapter").provenance["prompts_sha256"])
    assert written[0] == written[1]


def test_a_folder_in_place_of_prompts(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(generator_folder), str(tmp_path), str(tmp_path / "adapter")]) == 1
    assert "is a folder" in capsys.readouterr().err


def test_an_interrupted_command_ends_without_a_traceback(
    generator_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_dnd.cli.main.PromptConditionedLoraGeneratorConfig.from_pretrained", interrupt)
    assert main(["show", str(generator_folder)]) == 130
    assert capsys.readouterr().err == "peft-dnd: interrupted.\n"


def test_a_task_whose_prompts_are_given_twice_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("what is the law ?", encoding="utf-8")
    twice = ["--prompts", f"law={tmp_path / 'prompts.txt'}"] * 2
    command = ["import-adapters", str(tmp_path), str(tmp_path / "pairs"), "--settings", "coding-1.5b"]
    assert main([*command, *twice]) == 1
    assert "'law' twice" in capsys.readouterr().err
