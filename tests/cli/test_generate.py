# SPDX-License-Identifier: Apache-2.0
"""`generate`: prompts from wherever they are, one adapter or many, and bad input named before anything is written."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.constants import TASK_PROMPTS

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator


PROMPTS = ["what is the law ?", "a court , please"]


def write(folder: Path, kind: str, prompts: list[str], column: str = "prompt") -> Path:
    path = folder / f"prompts.{kind}"
    if kind == "txt":
        path.write_text("\n".join([*prompts, "", ""]), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({column: prompt}) for prompt in prompts), encoding="utf-8")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"number": [*range(len(prompts))], column: prompts}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            rows.writerows([["number", column], *enumerate(prompts)])
    return path


def same(folder: Path, adapter: GeneratedAdapter) -> bool:
    found, expected = GeneratedAdapter.from_pretrained(folder).state_dict(), adapter.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_writes_the_same_as_python_from_every_kind_of_file(
    run, generator: PromptConditionedLoraGenerator, generator_folder: Path, tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path, kind, PROMPTS)
    ran = run("generate", generator_folder, path, tmp_path / "adapter", "--json")
    assert ran.code == 0, ran.err
    expected = generator.generate_adapter(PROMPTS)
    assert same(tmp_path / "adapter", expected)
    assert ran.facts["prompts"] == 2 and ran.facts["parameters"] == expected.num_parameters
    assert ran.facts["provenance"]["prompts_sha256"] == expected.provenance["prompts_sha256"]


def test_reads_standard_input(run, generator, generator_folder, tmp_path, monkeypatch) -> None:
    for options, content in (((), "\n".join(PROMPTS)), (("--format", "jsonl"), '{"prompt": "a court"}\n')):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        assert run("generate", generator_folder, "-", tmp_path / "adapter", *options).code == 0
        expected = PROMPTS if not options else ["a court"]
        assert same(tmp_path / "adapter", generator.generate_adapter(expected))


def test_reads_a_data_set(run, generator, generator_folder, tmp_path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "jsonl", PROMPTS, column="question")
    ran = run("generate", generator_folder, tmp_path / "adapter", "--dataset", folder, "--column", "question")
    assert ran.code == 0, ran.err
    assert same(tmp_path / "adapter", generator.generate_adapter(PROMPTS))
    wrong = run("generate", generator_folder, tmp_path / "other", "--dataset", folder, "--column", "qestion")
    assert wrong.code == 1 and "Did you mean 'question'?" in wrong.err and not (tmp_path / "other").exists()


def test_a_folder_of_files_is_several_tasks(run, generator, generator_folder, tmp_path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in ("law", "med"):
        (folder / f"{task}.txt").write_text("\n".join(TASK_PROMPTS[task]), encoding="utf-8")
    (folder / "notes.md").write_text("not a task", encoding="utf-8")
    ran = run("generate", generator_folder, folder, tmp_path / "adapters", "--json", "--quiet")
    assert ran.code == 0, ran.err
    assert [fact["task"] for fact in ran.facts["adapters"]] == ["law", "med"]
    for task in ("law", "med"):
        assert same(tmp_path / "adapters" / task, generator.generate_adapter(TASK_PROMPTS[task]))


def test_pushes_each_task_to_a_repository_of_its_own(run, generator_folder, tmp_path, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr(GeneratedAdapter, "push_to_hub", lambda self, name, **how: pushed.append((name, how)))
    path = write(tmp_path, "txt", PROMPTS)
    assert run("generate", generator_folder, path, "--push-to-hub", "me/adapter", "--private").code == 0
    assert pushed == [("me/adapter", {"prompts": None, "private": True})]
    folder = tmp_path / "tasks"
    folder.mkdir()
    path.rename(folder / "law.txt")
    assert run("generate", generator_folder, folder, "--push-to-hub", "me/adapter").code == 0
    assert pushed[1:] == [("me/adapter-law", {"prompts": None, "private": None})]


def test_streams(run, generator, generator_folder, tmp_path) -> None:
    path = write(tmp_path, "txt", PROMPTS)
    assert run("generate", generator_folder, path, tmp_path / "adapter", "--stream", "--seed", 1).code == 0
    assert same(tmp_path / "adapter", generator.generate_adapter(PROMPTS, seed=1))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("prompts.jsonl", None, "does not exist"),
        ("prompts.jsonl", "", "empty"),
        ("prompts.jsonl", "{", "Line 1"),
        ("prompts.jsonl", '\n{"prompt": "x"}\n\n{', "Line 4"),
        ("prompts.jsonl", "[1]", "no JSON object"),
        ("prompts.jsonl", "[" * 100_000, "no JSON object"),
        ("prompts.jsonl", '{"promt": "x"}', "has no 'prompt'"),
        ("prompts.jsonl", '{"prompt": 3}', "must be a text"),
        ("prompts.jsonl", '{"prompt": " "}', "white space"),
        ("prompts.csv", "text\nlaw\n", "has no 'prompt'"),
        ("prompts.csv", 'prompt\n"law', "CSV"),
        ("prompts.csv", "prompt\nlaw\nwhat, where ?\n", "Line 3 of"),
        ("prompts.csv", "text\na,b\n", "has 2 fields, and the header names 1"),
        ("prompts.parquet", "PAR1", "Parquet"),
    ],
)
def test_bad_input_is_named_and_nothing_written(run, generator_folder, tmp_path, name, content, words) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    ran = run("generate", generator_folder, tmp_path / name, tmp_path / "adapter")
    # transformers 5.1 shows a bar while it loads the generator.
    (said,) = [line for line in ran.err.splitlines() if line and not line.startswith("Loading weights")]
    assert ran.code == 1 and words in said and not ran.out
    assert not (tmp_path / "adapter").exists()


def test_a_near_miss_of_a_path_is_told(run, generator_folder, tmp_path) -> None:
    write(tmp_path, "txt", PROMPTS)
    ran = run("generate", generator_folder, tmp_path / "promps.txt", tmp_path / "adapter")
    assert f"There is {str(tmp_path / 'prompts.txt')!r}." in ran.err


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_in_another_encoding_are_named(run, generator_folder, tmp_path, name) -> None:
    (tmp_path / name).write_bytes("the café".encode("latin-1"))
    ran = run("generate", generator_folder, tmp_path / name, tmp_path / "adapter")
    assert ran.code == 1 and name in ran.err and "UTF-8" in ran.err
    assert not (tmp_path / "adapter").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(run, generator_folder, tmp_path) -> None:
    written = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "prompts.txt").write_text("what is the law ?", encoding=encoding)
        ran = run("generate", generator_folder, tmp_path / "prompts.txt", tmp_path / "adapter", "--json")
        written.append(ran.facts["provenance"]["prompts_sha256"])
    assert written[0] == written[1]


def test_a_folder_without_prompts_and_two_files_of_one_task(run, generator_folder, tmp_path) -> None:
    ran = run("generate", generator_folder, tmp_path, tmp_path / "adapter")
    assert ran.code == 1 and "without a file of prompts" in ran.err
    for name in ("law.txt", "law.jsonl"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    ran = run("generate", generator_folder, tmp_path, tmp_path / "adapter")
    assert ran.code == 1 and "both of task 'law'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generator",), "no prompts"),
        (("generator", "prompts.txt"), "no place"),
        (("generator", "--dataset", "x"), "no place"),
        (("generator", "prompts.txt", "adapter", "--dataset", "x"), "With --dataset"),
        (("generator", "prompts.txt", "adapter", "--out-of-distribution", "shrnk"), "shrink"),
        (("generator", "prompts.txt", "adapter", "--seed", "-1"), "--seed"),
    ],
)
def test_wrong_calls_end_with_2(run, arguments, words) -> None:
    ran = run("generate", *arguments)
    assert ran.code == 2 and words in ran.err and not ran.out


def test_an_out_of_distribution_action_needs_a_generator_that_knows_its_tasks(run, generator_folder, tmp_path) -> None:
    path = write(tmp_path, "txt", PROMPTS)
    ran = run("generate", generator_folder, path, tmp_path / "adapter", "--out-of-distribution", "refuse")
    assert ran.code == 1 and "fitted tasks' prompts" in ran.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_reads_what_a_shell_pipes(run, generator, generator_folder, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("\n".join(PROMPTS),))
    writer.start()
    ran = run("generate", generator_folder, pipe, tmp_path / "adapter")
    writer.join()
    assert ran.code == 0, ran.err
    assert same(tmp_path / "adapter", generator.generate_adapter(PROMPTS))
    ran = run("generate", generator_folder, os.devnull, tmp_path / "none")
    assert ran.code == 1 and "is empty" in ran.err


def test_does_not_write_among_the_files_of_something_else(
    run, generator_folder, base_folder, pairs_folder, tmp_path
) -> None:
    """transformers would put the adapter on the base, whoever loads it from then on."""
    prompts = write(tmp_path, "txt", PROMPTS)
    for there, file in (
        (base_folder, "config.json"),
        (generator_folder, "config.json"),
        (pairs_folder / "law", "task"),
    ):
        before = sorted(there.iterdir())
        ran = run("generate", generator_folder, prompts, there)
        assert ran.code == 1 and file in ran.err and "a folder of the adapter's own" in ran.err
        assert sorted(there.iterdir()) == before
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks", "txt", PROMPTS).rename(tmp_path / "tasks" / "law.txt")
    assert run("generate", generator_folder, tmp_path / "tasks", pairs_folder).code == 1
    assert run("generate", generator_folder, prompts, tmp_path / "adapter").code == 0
    assert run("export", tmp_path / "adapter", base_folder, "--to", "vllm").code == 1
    assert run("generate", generator_folder, prompts, tmp_path / "adapter").code == 0, "its own may be written again"


def test_a_misspelt_folder_is_recognised(run, generator_folder, tmp_path) -> None:
    prompts = write(tmp_path, "txt", PROMPTS)
    near = generator_folder.with_name(generator_folder.name.replace("e", "a", 1))
    ran = run("generate", near, prompts, tmp_path / "adapter")
    assert ran.code == 1 and f"There is a folder {str(generator_folder)!r} here." in ran.err


def test_a_file_without_line_breaks_is_not_taken_for_a_prompt(run, generator_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_dnd.text.prompt_files._LONGEST", 1000)
    (tmp_path / "prompts.txt").write_text("law\n" + "law " * 300, encoding="utf-8")
    ran = run("generate", generator_folder, tmp_path / "prompts.txt", tmp_path / "adapter")
    assert ran.code == 1 and "row 2" in ran.err and "1,200 characters; the most are 1,000" in ran.err
