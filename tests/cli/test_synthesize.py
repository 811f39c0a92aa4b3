# SPDX-License-Identifier: Apache-2.0
"""`synthesize`: a task and a file of a few seeds by the command alone, and what it says to what is wrong."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.openai_server import Server


pytest_plugins = ("support.openai_server",)


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows = [{"prompt": f"what is {what} ?", "answer": "court"} for what in ("law", "tax", "medicine", "the river")]
    file = tmp_path / "seeds.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture
def options(server: Server, url: str, seeds: Path, encoder_folder: Path) -> list[Any]:
    numbers = count(1)

    def chat(body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][0]["content"]
        lines = [f"{place}. what is the law of w{next(numbers)} ?" for place in (1, 2)]
        text = "\n".join(lines) if "more requests" in asked else "court"
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    server.answer = chat
    bounds = ["--least-likeness", "-1", "--closest", "1", "--text-encoder", encoder_folder]
    return ["--seeds", seeds, "--count", "3", *bounds, "--endpoint", url, "--endpoint-model", "big", "--json", "-q"]


def test_a_file_for_collect_and_a_task_to_fit_to(
    run: Any, options: list[Any], server: Server, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_DND_ENDPOINT_TOKEN", "secret")
    file = tmp_path / "law.jsonl"
    ran = run("synthesize", file, *options, "--votes", "3")
    assert ran.code == 0, ran.err
    assert ran.facts["prompts"] == 3 and ran.facts["answered"] and ran.facts["output"] == str(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7 and {row["answer"] for row in rows} == {"court"}
    assert {token for _, token, _ in server.asked} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "law.synthesis.jsonl").read_text(encoding="utf-8")

    options += [
        "--base",
        base_folder,
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
        "--stop",
        " ",
        "--no-apply-chat-template",
    ]
    asked = len(server.asked)
    ran = run("synthesize", tmp_path / "pairs" / "law", *options)
    assert ran.code == 0, ran.err
    assert all("more requests" in body["messages"][0]["content"] for _, _, body in server.asked[asked:])
    ran = run("inspect", tmp_path / "pairs", "--json")
    assert ran.facts["tasks"]["law"]["distilled"] == 7 and ran.facts["tasks"]["law"]["prompts"] == 7


def test_what_is_wrong_is_said_and_nothing_is_written(
    run: Any, options: list[Any], seeds: Path, encoder_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    file, folder = tmp_path / "out" / "law.jsonl", tmp_path / "out" / "law"
    at = options.index("--endpoint")
    for arguments, code, words in (
        ((file,), 2, "--base"),
        ((folder, *options), 2, "--base"),
        ((file, "--base", base_folder), 2, "--seeds"),
        ((file, "--endpoint", "http://x/v1"), 2, "--endpoint-model"),
        ((file, "--base", base_folder, "--seeds", tmp_path / "seed.jsonl"), 1, "seeds.jsonl"),
        ((file, "--base", base_folder, "--seeds", empty), 1, "is empty"),
        ((file, *options, "--column", "promt"), 1, "Did you mean 'prompt'?"),
        ((file, "--base", base_folder, "--description-file", tmp_path / "typo"), 1, "typo"),
        ((file, *options, "--text-encoder", tmp_path / "nowhere"), 1, "nowhere"),
        ((file, *options, "--closest", "95"), 1, "closest is a cosine"),
        ((file, *options[:at], "--endpoint", "http://127.0.0.1:9/v1", *options[at + 2 :]), 1, "cannot be reached"),
        ((folder, "--base", tmp_path / "nobase", "--seeds", seeds, "--text-encoder", encoder_folder), 1, "nobase"),
    ):
        ran = run("synthesize", *arguments)
        assert ran.code == code and words in ran.err, (arguments, ran)
        assert not file.exists() and not folder.exists()
    assert run("synthesise").code == 2
