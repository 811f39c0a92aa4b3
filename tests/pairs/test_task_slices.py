# SPDX-License-Identifier: Apache-2.0
"""Many tasks in many jobs: slices of the list, and a pairs folder that is the same however it was collected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.collecting import in_child_process, needs_fork
from torch import nn
from transformers import AutoTokenizer

from peft_dnd import PromptCheckpointDataset
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.pairs.folder import read_task, write_task
from peft_dnd.pairs.task_slices import is_complete, tasks_of_slice, uncollected


SCRIPT = Path(__file__).parents[2] / "examples" / "collect_in_parallel" / "collect.py"
TASKS = ("law", "tax", "river 2", "river 10", "court")
SETTINGS = ("--steps", "4", "--checkpoints", "2", "--batch-size", "4", "--learning-rate", "1e-2", "--threads", "1")


@pytest.fixture(scope="module")
def options(base_model: nn.Module, encoder_folder: Path, tmp_path_factory: Any) -> list[str]:
    """A base with its tokenizer and five tasks, as options of the script."""
    folder = tmp_path_factory.mktemp("tasks")
    base_model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(folder / "base")
    (folder / "tasks").mkdir()
    for task in TASKS:
        rows = [{"prompt": f"what is {task} {word} ?", "answer": word} for word in ("river", "law", "tax", "a")]
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / "tasks" / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    return ["--base", str(folder / "base"), "--tasks", str(folder / "tasks"), *SETTINGS]


@pytest.fixture(scope="module")
def collect() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import collect as module
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def run(collect: ModuleType, *arguments: Any) -> int:
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, arguments)]
    try:
        torch.set_num_threads(1)
        return collect.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def alone(collect: ModuleType, options: list[str], tmp_path_factory: Any) -> Path:
    """What one process collects."""
    pairs = tmp_path_factory.mktemp("alone") / "pairs"
    assert run(collect, *options, "--pairs", pairs) == 0
    return pairs


def contents(pairs: Path) -> dict[str, Any]:
    """All files of a folder: bytes, but for PEFT's configurations, whose lists have no order."""

    def content(path: Path) -> Any:
        if path.name != "adapter_config.json":
            return path.read_bytes()
        fields = json.loads(path.read_text(encoding="utf-8"))
        return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}

    return {str(path.relative_to(pairs)): content(path) for path in pairs.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_slices_are_all_tasks_and_have_none_in_common(count: int) -> None:
    slices = [tasks_of_slice(reversed(TASKS), f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(task for part in slices for task in part) == sorted(TASKS)
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    assert slices == [tasks_of_slice(TASKS, f"{number}/{count}") for number in range(1, count + 1)]


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/4 "])
def test_what_is_no_slice_is_refused(part: str) -> None:
    with pytest.raises(GeneratorConfigError, match="k/n"):
        tasks_of_slice(TASKS, part)


def test_a_task_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(GeneratorConfigError, match="'law' is in the list twice"):
        tasks_of_slice([*TASKS, "law"], "1/2")


@needs_fork
def test_two_jobs_at_once_collect_what_one_does(
    collect: ModuleType, options: list[str], alone: Path, tmp_path: Path
) -> None:
    assert len(PromptCheckpointDataset.from_folder(alone)) == 2 * len(TASKS)
    pairs = tmp_path / "pairs"
    jobs = [in_child_process(run, collect, *options, "--pairs", pairs, "--slice", f"{k}/2") for k in (1, 2)]
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert contents(pairs) == contents(alone)


def test_a_second_run_does_what_is_left(collect: ModuleType, options: list[str], alone: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(alone, pairs)
    # One job was killed in the midst of a task, another never began its own.
    record = read_task(pairs / "law")
    write_task(pairs / "law", type(record)(record.task, initialization=record.initialization))
    (pairs / "law" / "checkpoints" / "step-00000004.safetensors").unlink()
    shutil.rmtree(pairs / "tax")
    assert [is_complete(pairs / task) for task in TASKS] == [False, False, True, True, True]
    assert uncollected(TASKS, pairs) == ["law", "tax"]

    before = {path: path.stat().st_mtime_ns for path in (pairs / "court").rglob("*")}
    assert run(collect, *options, "--pairs", pairs) == 0
    assert contents(pairs) == contents(alone)
    assert {path: path.stat().st_mtime_ns for path in (pairs / "court").rglob("*")} == before
    everything = {path: path.stat().st_mtime_ns for path in pairs.rglob("*")}
    assert run(collect, *options, "--pairs", pairs) == 0
    assert {path: path.stat().st_mtime_ns for path in pairs.rglob("*")} == everything


def test_a_task_that_fails_does_not_keep_the_others(
    collect: ModuleType, options: list[str], alone: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(options[3], tasks)
    (tasks / "broken.jsonl").write_text('{"prompt": "what ?"}\n', encoding="utf-8")
    altered = [*options[:3], str(tasks), *options[4:]]
    assert run(collect, *altered, "--pairs", tmp_path / "pairs") == 1
    assert contents(tmp_path / "pairs") == contents(alone)


@pytest.mark.slow
def test_local_workers_collect_what_one_process_does(options: list[str], alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *options, "--pairs", tmp_path / "pairs", "--workers", 2]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert contents(tmp_path / "pairs") == contents(alone)


@pytest.mark.slow
def test_ray_collects_what_one_process_does(options: list[str], alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, SCRIPT, *options, "--pairs", tmp_path / "pairs", "--ray"]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    assert contents(tmp_path / "pairs") == contents(alone)
