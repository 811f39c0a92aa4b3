# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: what it registers and when, which adapters it gives, and to whom; vLLM's classes are stand-ins."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.constants import TASK_PROMPTS
from support.engine_stand_ins import LoRARequest, StandIn, tar_of

import peft_dnd_vllm
from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.engines import AdapterResolver, TaskFolder
from peft_dnd.errors import CorruptFileError, EngineError, PromptError


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "law.txt").write_text("\ufeff" + "\r\n".join(TASK_PROMPTS["law"]) + "\n\n", encoding="utf-8")
    rows = [json.dumps({"prompt": prompt, "answer": "x"}) for prompt in TASK_PROMPTS["med"]]
    (folder / "med.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "notes.md").write_text("no task", encoding="utf-8")
    return folder


@pytest.fixture
def environment(generator_folder: Path, task_files: Path, tmp_path: Path, monkeypatch) -> dict[str, str]:
    """That of a server that generates in place."""
    for name in [name for name in os.environ if name.startswith("PEFT_DND")]:
        monkeypatch.delenv(name)
    set_ = {"GENERATOR": str(generator_folder), "TASKS": str(task_files), "CACHE": str(tmp_path / "cache")}
    found = {f"PEFT_DND_{name}": value for name, value in set_.items()}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def resolver(environment, vllm_registry) -> AdapterResolver:
    peft_dnd_vllm.register()
    return vllm_registry["peft_dnd"]


def ask(resolver: AdapterResolver, name: str, base: str = "served") -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(base, name))


def test_a_task_by_name_is_generated(resolver, task_files, generator, tmp_path) -> None:
    lines = [f'"{prompt}",3' for prompt in TASK_PROMPTS["art"]]
    (task_files / "art.csv").write_text("\n".join(["prompt,number", *lines]), encoding="utf-8")
    (task_files / "geo.json").write_text(json.dumps([{"prompt": prompt} for prompt in TASK_PROMPTS["geo"]]))
    for task in ("law", "med", "art", "geo"):
        request = ask(resolver, task)
        assert request is not None and request.lora_name == task
        expected = generator.generate_adapter(TASK_PROMPTS[task])
        expected.save_pretrained(tmp_path / "expected")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert Path(request.lora_path, name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
        again = ask(resolver, f"dnd:{Path(request.lora_path).name}")
        assert again is not None and again.lora_path == request.lora_path
        assert ask(resolver, f"dnd:{task}").lora_path == request.lora_path


def test_names_that_are_no_tasks(resolver, tmp_path) -> None:
    for name in ("notes", "law.txt", "typo", "dnd:typo", "../tasks/law", "dnd:", f"dnd:{'0' * 64}", str(tmp_path)):
        assert ask(resolver, name) is None, name


def test_ids_are_the_same_in_every_process_and_differ(resolver, environment, vllm_registry) -> None:
    first = {task: ask(resolver, task).lora_int_id for task in ("law", "med", "dnd:law")}
    peft_dnd_vllm.register()
    second = vllm_registry["peft_dnd"]
    assert second is not resolver
    assert {task: ask(second, task).lora_int_id for task in first} == first
    assert len(set(first.values())) == 3 and all(0 < number < 2**63 for number in first.values())


def test_a_file_that_comes_or_changes_while_it_runs(resolver, task_files, generator) -> None:
    assert ask(resolver, "geo") is None
    (task_files / "geo.txt").write_text("what is the capital ?", encoding="utf-8")
    before = ask(resolver, "geo")
    (task_files / "geo.txt").write_text("the river please", encoding="utf-8")
    after = ask(resolver, "geo")
    assert before.lora_path != after.lora_path and before.lora_int_id != after.lora_int_id


def test_two_requests_at_once_load_one_generator(resolver, monkeypatch) -> None:
    loads: list[str] = []
    load = PromptConditionedLoraGenerator.from_pretrained
    monkeypatch.setattr(
        PromptConditionedLoraGenerator, "from_pretrained", lambda name: loads.append(name) or load(name)
    )

    async def both() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora("served", name) for name in ("law", "med", "law")))

    law, med, again = asyncio.run(both())
    assert len(loads) == 1 and law == again and law.lora_path != med.lora_path


def test_an_adapter_for_another_base_is_refused_with_a_word(
    resolver, environment, vllm_registry, generator, tmp_path, monkeypatch, caplog
) -> None:
    other = GeneratedAdapter(
        generator.config.adapter_layout, generator.generate_adapter(TASK_PROMPTS["law"]).state_dict()
    )

    class Source:
        def find(self, name: str) -> Path:
            return tmp_path / "kept"

    other.save_pretrained(tmp_path / "kept")
    path = tmp_path / "kept" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}))
    for served in ("org/base", "/models/base/", "/cache/models--org--base/snapshots/abc"):
        assert ask(AdapterResolver(Source()), "law", served) is not None
    with caplog.at_level(logging.ERROR):
        assert ask(AdapterResolver(Source()), "law", "org/other") is None
    assert "PEFT_DND_BASE=org/base" in caplog.text
    assert ask(AdapterResolver(Source(), "org/base"), "law", "org/other") is not None


def test_from_a_service(service: StandIn, adapter_files, vllm_registry, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PEFT_DND_SERVICE_URL", service.url)
    monkeypatch.setenv("PEFT_DND_SERVICE_TOKEN", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PEFT_DND_CACHE", raising=False)
    peft_dnd_vllm.register()
    resolver = vllm_registry["peft_dnd"]
    service.says("/v1/adapters", {"id": "a" * 64})
    service.says(f"/v1/adapters/{'a' * 64}", tar_of(adapter_files))
    assert ask(resolver, "law").lora_path == str(tmp_path / "peft_dnd" / "engines" / ("a" * 64))
    assert service.asked[0][2] == "Bearer secret"
    service.says("/v1/adapters", {}, status=503)
    with pytest.raises(EngineError, match="503"):  # it can only have been meant for us
        ask(resolver, "dnd:law")
    with caplog.at_level(logging.ERROR):
        assert ask(resolver, "law") is None  # it may be another resolver's
    assert "503" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PEFT_DND_TASKS": ""}, "PEFT_DND_TASKS is not"),
        ({"PEFT_DND_TASKS": "nowhere"}, "no folder of tasks"),
        ({"PEFT_DND_SERVICE_URL": "http://host"}, "both set"),
        ({"PEFT_DND_GENERATOR": "", "PEFT_DND_SERVICE_URL": "host"}, "must be like"),
    ],
)
def test_a_server_with_half_a_setting_does_not_start(environment, vllm_registry, monkeypatch, changes, words) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=words):
        peft_dnd_vllm.register()
    assert vllm_registry == {}


def test_a_server_that_was_not_told_notices_nothing() -> None:
    script = "import sys, peft_dnd_vllm; peft_dnd_vllm.register(); print(*sorted(sys.modules))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_DND")}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "peft", "transformers", "peft_dnd", "numpy"} & set(ran.stdout.split())


def test_files_that_are_none_of_prompts(task_files, generator_folder, tmp_path) -> None:
    folder = TaskFolder(str(generator_folder), task_files, tmp_path / "cache")
    for name, content, error in (
        ("empty.txt", b"\n \n", PromptError),
        ("latin.txt", "très".encode("latin-1"), CorruptFileError),
        ("list.jsonl", b'["a"]', CorruptFileError),
        ("cut.jsonl", b'{"prompt": "a"}\n{"prompt', CorruptFileError),
        ("number.jsonl", b'{"prompt": 3}', CorruptFileError),
        ("deep.jsonl", b"[" * 100_000, CorruptFileError),
        ("other.csv", b"question\nlaw", CorruptFileError),
    ):
        (task_files / name).write_bytes(content)
        with pytest.raises(error, match=name.split(".")[0]):
            folder.find(name.split(".")[0])
    (task_files / "law.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    with pytest.raises(EngineError, match=r"law\.jsonl.*law\.txt"):
        folder.find("law")
    assert not (tmp_path / "cache").exists()
