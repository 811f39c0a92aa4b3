# SPDX-License-Identifier: Apache-2.0
"""`serve`: what is wrong is named before anything is loaded, and what is given reaches the service."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import pytest
import typer
import uvicorn
from fastapi.testclient import TestClient

from peft_dnd.cli.serve import _gate_bases


pytestmark = pytest.mark.usefixtures("logging_as_it_was")


@pytest.fixture
def started(monkeypatch) -> list[uvicorn.Config]:
    """What would have been served."""
    configs: list[uvicorn.Config] = []

    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        configs.append(self.config)
        self.started = True

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return configs


def test_what_is_given_reaches_the_service(run, started, generator_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_DND_TOKENS", "me:0123456789abcdef")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "law.txt").write_text("what is the law ?\n")
    (tmp_path / "tasks" / "med.jsonl").write_text('{"prompt": "a doctor"}\n')
    places = [f"--generator={name}={generator_folder}" for name in ("first", "second")]
    options = ["--cache", tmp_path / "cache", "--tasks", tmp_path / "tasks", "--port", 0, "--max-prompts", 7]
    ran = run("serve", *places, *options, "--max-cache-gb", "0.5", "--remember-prompts", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "PEFT_DND_TOKENS" not in os.environ
    service = started[0].app.state.service
    assert list(service.generators) == ["first", "second"] and service.tasks.remember_prompts
    assert service.limits.prompts == 7 and service.limits.cache_bytes == 500_000_000
    with TestClient(started[0].app, headers={"Authorization": "Bearer 0123456789abcdef"}) as client:
        tasks = client.get("/v1/tasks").json()["tasks"]
        assert [(task["task"], task["fixed"]) for task in tasks] == [("law", True), ("med", True)]
        assert client.post("/v1/adapters", json={"task": "law"}).json()["generator"] == "first"
        schema = client.get("/openapi.json").json()["components"]["schemas"]["FromPrompts"]["properties"]
        assert schema["prompts"]["maxItems"] == 7


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--generator", "GENERATOR", "--cache", "c"], 2, "NAME=PLACE"),
        (["--generator", "a=GENERATOR", "--generator", "a=x", "--cache", "c"], 2, "--generator names 'a' twice"),
        (["--generator", "a=GENERATOR"], 2, "--cache"),
        (["--generator", "a=GENERATOR", "--cash", "c"], 2, "--cache"),
        (["--cache", "c"], 2, "--generator"),
        (["--generator", "a=no-such", "--cache", "c"], 1, "'no-such'"),
        (["--generator", "a b=GENERATOR", "--cache", "c"], 1, "'a b'"),
        (["--generator", "a=GENERATOR", "--cache", "full"], 1, "no cache of this service"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--tasks", "typo"], 1, "'typo'"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--tasks", "full"], 1, "folder without a file of prompts"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--token-file", "typo"], 1, "The file of tokens 'typo'"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--token-file", "short"], 1, "5 characters"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--host", "0.0.0.0"], 1, "--open-to-all"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--host", "no.such.host.invalid"], 1, "Cannot listen"),
        (["--generator", "a=GENERATOR", "--cache", "c", "--device", "typo"], 1, "'typo'"),
    ],
)
def test_what_is_wrong_is_named(
    run, started, generator_folder, tmp_path, monkeypatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    (tmp_path / "short").write_text("short")
    ports = ["--port", "0"]
    ran = run("serve", *(part.replace("GENERATOR", str(generator_folder)) for part in arguments), *ports)
    assert ran.code == code and words in ran.err and "Traceback" not in ran.err, ran.err
    assert not started and not list((tmp_path / "c").glob("work/*"))


def test_a_port_that_is_taken_is_told_at_once(run, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = run("serve", "--generator", "a=nothing", "--cache", tmp_path / "cache", "--port", port)
    assert ran.code == 1 and f"port {port}" in ran.err and not (tmp_path / "cache").exists()


def test_what_it_needs_is_named_where_it_is_missing(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_dnd.cli.serve.find_spec", lambda package: None if package == "fastapi" else object())
    ran = run("serve", "--generator", "a=nothing", "--cache", tmp_path / "cache")
    assert ran.code == 1 and "(fastapi): pip install 'peft-dnd[serve]'" in ran.err


def test_logs_are_json(run, started, generator_folder, tmp_path) -> None:
    assert run("serve", "--generator", f"a={generator_folder}", "--cache", tmp_path / "c", "--port", 0).code == 0
    (handler,) = logging.getLogger().handlers
    record = logging.getLogger("uvicorn.error").makeRecord("uvicorn.error", 20, "", 0, "up on %s", ("port",), None)
    assert json.loads(handler.format(record))["message"] == "up on port"


def test_the_environment_is_named_in_the_reference() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
    assert "`PEFT_DND_TOKENS`" in page.read_text(encoding="utf-8")


def test_the_gate_of_a_named_generator_is_checked_on_the_base_that_is_named_for_it() -> None:
    names = ["small", "large"]
    for given in (["small=one", "other"], ["other", "small=one"]):
        assert _gate_bases(given, names) == {"small": "one", "large": "other"}
    assert _gate_bases(["small=one"], names) == {"small": "one"} and _gate_bases([], names) == {}
    for wrong in (["smal=one"], ["one", "other"], ["small=one", "small=other"], ["small="]):
        with pytest.raises(typer.BadParameter):
            _gate_bases(wrong, names)
