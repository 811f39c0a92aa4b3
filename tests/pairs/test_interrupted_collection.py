# SPDX-License-Identifier: Apache-2.0
"""Collecting through kills, full disks and resumed runs."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.collecting import (
    PROMPTS,
    StopAt,
    adapter_of,
    equal,
    files_of,
    fresh_adapter,
    in_child_process,
    needs_fork,
    train,
)
from torch import nn

import peft_dnd.storage.files
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import (
    PairsFolderError,
)
from peft_dnd.pairs.collector import CheckpointCollector
from peft_dnd.pairs.dataset import PromptCheckpointDataset
from peft_dnd.pairs.folder import read_task, stored_steps
from peft_dnd.pairs.prompt_pool import read_prompts
from peft_dnd.pairs.writer import PairWriter


@pytest.fixture
def fresh(fresh_base: Callable[[], nn.Module], lora_config: LoraConfig) -> Callable[..., PeftModel]:
    return functools.partial(fresh_adapter, fresh_base, lora_config)


def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path, fresh):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = tmp_path / "whole" / "law"
    train(fresh(), tmp_path / "run1", CheckpointCollector(whole, PROMPTS, last=6), **settings)

    cut = tmp_path / "cut" / "law"
    collector = CheckpointCollector(cut, PROMPTS, last=6)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), tmp_path / "run2", collector, StopAt(5, kill=True), **settings)
    assert stored_steps(cut) == (3, 4, 5) and not read_task(cut).complete
    kept = (cut / "checkpoints" / "step-00000003.safetensors").stat().st_ino

    resumed = CheckpointCollector(cut, PROMPTS, last=6)
    train(fresh(seed=77), tmp_path / "run2", resumed, resume=str(tmp_path / "run2" / "checkpoint-3"), **settings)
    assert files_of(cut) == files_of(whole)
    assert (cut / "checkpoints" / "step-00000003.safetensors").stat().st_ino == kept
    assert read_task(cut) == read_task(whole)


def test_resuming_a_run_that_was_finished_changes_nothing(tmp_path, fresh):
    settings = {"save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=3), **settings)
    before = files_of(folder)
    last = str(tmp_path / "run" / "checkpoint-6")
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=3), resume=last, **settings)
    assert files_of(folder) == before
    assert read_task(folder).complete


def test_a_run_that_is_resumed_to_go_on_for_longer_keeps_its_new_last_steps_only(tmp_path, fresh):
    settings = {"save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=3), **settings)
    longer = CheckpointCollector(folder, PROMPTS, last=3)
    train(fresh(), tmp_path / "run", longer, resume=str(tmp_path / "run" / "checkpoint-6"), **settings, max_steps=8)
    assert read_task(folder).steps == stored_steps(folder) == (6, 7, 8)


def test_what_another_run_left_is_not_mixed_into_a_resumed_one(tmp_path, fresh, caplog):
    settings = {"save_strategy": "steps", "save_steps": 4}
    ours = CheckpointCollector(tmp_path / "ours" / "law", PROMPTS, last=4)
    train(fresh(), tmp_path / "run", ours, **settings)
    folder = tmp_path / "theirs" / "law"
    other = CheckpointCollector(folder, PROMPTS, last=4)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(seed=5), tmp_path / "run_other", other, StopAt(5, kill=True), data_seed=5, **settings)
    assert stored_steps(folder) == (3, 4, 5)

    resumed = CheckpointCollector(folder, PROMPTS, last=4)
    with caplog.at_level(logging.WARNING, logger="peft_dnd"):
        train(fresh(), tmp_path / "run", resumed, resume=str(tmp_path / "run" / "checkpoint-4"), **settings)
    assert "written by another run" in caplog.text
    assert "steps 3 to 4 are missing" in caplog.text
    assert read_task(folder).steps == (5, 6)


def test_a_run_from_the_start_clears_what_a_killed_one_left(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=6), StopAt(3, kill=True))
    (folder / "checkpoints" / ".peft_dnd_staging_x.safetensors").write_bytes(b"half")
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, ["new prompts"], last=2))
    assert read_task(folder).steps == (5, 6)
    assert list(files_of(folder)) == ["notes.txt", "step-00000005.safetensors", "step-00000006.safetensors"]
    assert read_prompts(folder) == ("new prompts",)


def test_a_complete_task_is_only_replaced_when_asked(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=3))
    before = files_of(folder)
    with pytest.raises(PairsFolderError, match=r"'law'.*complete.*overwrite=True"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=3))
    assert files_of(folder) == before and read_task(folder).complete
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1, overwrite=True), data_seed=3)
    assert read_task(folder).steps == stored_steps(folder) == (6,)


def test_early_stopping_leaves_the_steps_found_and_says_so(tmp_path, fresh, caplog):
    folder = tmp_path / "pairs" / "law"
    with caplog.at_level(logging.WARNING, logger="peft_dnd"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=4), StopAt(4))
    assert "2 of the 4 checkpoints" in caplog.text and "step 4 of 6" in caplog.text
    assert read_task(folder).complete and read_task(folder).steps == (3, 4)


def test_stopping_before_the_first_step_to_keep_is_an_error_and_leaves_no_complete_task(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    with pytest.raises(PairsFolderError, match="Not one checkpoint of task 'law'"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1), StopAt(4))
    assert not read_task(folder).complete


@needs_fork
@pytest.mark.parametrize("step", [1, 2], ids=["over a good file", "a new file"])
def test_a_kill_in_mid_write_leaves_no_broken_file(tmp_path, fresh, step):
    folder = tmp_path / "pairs" / "law"
    model = fresh()

    def killed() -> None:
        torch.set_num_threads(1)
        writer = PairWriter(folder, PROMPTS, AdapterLayout.from_model(model))
        writer.begin()
        writer.add(model, 1)
        real = peft_dnd.storage.files.save_file

        def save_half(tensors: Any, path: Path, metadata: Any) -> None:
            real(tensors, path, metadata=metadata)
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(9)

        peft_dnd.storage.files.save_file = save_half
        writer.add(model, step)

    child = in_child_process(killed)
    child.join(timeout=60)
    assert child.exitcode == 9
    assert stored_steps(folder) == (1,)
    assert equal(load_file(folder / "checkpoints" / "step-00000001.safetensors"), adapter_of(model))
    with pytest.raises(PairsFolderError, match=r"'law'.*incomplete"):
        PromptCheckpointDataset.from_folder(tmp_path / "pairs")


def test_a_full_disk_in_mid_write_leaves_the_good_file_and_nothing_beside_it(tmp_path, fresh, monkeypatch):
    folder = tmp_path / "pairs" / "law"
    model = fresh()
    writer = PairWriter(folder, PROMPTS, AdapterLayout.from_model(model))
    writer.begin()
    writer.add(model, 1)
    before = files_of(folder)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_dnd.storage.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        writer.add(model, 1)
    assert files_of(folder) == before
