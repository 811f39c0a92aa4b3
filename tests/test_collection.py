# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Collecting checkpoints from real, tiny training runs."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import peft_dnd.files
from peft_dnd.collection import CheckpointCollector, PairWriter, planned_steps
from peft_dnd.data import PromptCheckpointDataset
from peft_dnd.errors import (
    GeneratorConfigError,
    LayoutError,
    PairsFolderError,
    PromptError,
    PromptTypeError,
    WeightValueError,
)
from peft_dnd.initialization import has_common_initialization, use_common_initialization
from peft_dnd.layout import AdapterLayout
from peft_dnd.lora import live_state_dict
from peft_dnd.pairs import adapter_digest, read_prompts, read_task, stored_steps


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks the test process")
PROMPTS = ("what is the law ?", "Wie heißt das Gericht? 🙂", "two\nlines\u2028and more")


class Texts(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, seed: int) -> None:
        self.tokens = torch.randint(0, 50, (16, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class StopAt(TrainerCallback):
    """Ends training after a step, as early stopping does, or in the middle of one, as a kill does."""

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step = step
        self.kill = kill

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.kill and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.kill and state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture
def fresh(fresh_base: Callable[[], nn.Module], lora_config: LoraConfig) -> Callable[..., PeftModel]:
    """Makes a base model with a fresh adapter drawn from a seed."""

    def make(seed: int = 0, **changes: Any) -> PeftModel:
        torch.manual_seed(seed)
        config = copy.deepcopy(lora_config)
        for name, value in changes.items():
            setattr(config, name, value)
        return get_peft_model(fresh_base(), config)

    return make


def train(
    model: nn.Module,
    output: Path,
    *callbacks: TrainerCallback,
    data_seed: int = 0,
    resume: str | None = None,
    **arguments: Any,
) -> Trainer:
    settings = {"max_steps": 6, "save_strategy": "no", "learning_rate": 1e-2} | arguments
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **settings,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Texts(data_seed), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").iterdir())}


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in live_state_dict(model, "default").items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# What is written


def test_a_run_leaves_a_complete_task_whose_checkpoints_are_the_adapter_step_by_step(tmp_path, fresh, fresh_base):
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            seen[state.global_step] = adapter_of(kwargs["model"])

    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, prompts=list(PROMPTS), last=3), Watch())

    record = read_task(folder)
    assert (record.task, record.complete, record.steps) == ("law", True, (4, 5, 6))
    assert read_prompts(folder) == PROMPTS
    assert list(files_of(folder)) == [f"step-0000000{step}.safetensors" for step in (4, 5, 6)]
    for step in record.steps:
        assert equal(load_file(folder / "checkpoints" / f"step-{step:08d}.safetensors"), seen[step])
    assert not equal(seen[4], seen[5])

    # A checkpoint beside the task's adapter_config.json is what stock PEFT loads.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    (adapter / "adapter_model.safetensors").write_bytes(files_of(folder)["step-00000006.safetensors"])
    assert equal(adapter_of(PeftModel.from_pretrained(fresh_base(), adapter)), seen[6])
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_dataset_reads_what_the_collector_writes(tmp_path, fresh):
    for name in ("law", "medicine"):
        train(fresh(), tmp_path / "run", CheckpointCollector(tmp_path / "pairs" / name, PROMPTS, last=2))
    dataset = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert dataset.tasks == ("law", "medicine")
    assert dataset.layout.difference(AdapterLayout.from_model(fresh())) is None


def test_planned_steps_always_include_the_last():
    assert planned_steps(100, 50, 1) == tuple(range(51, 101))
    assert planned_steps(10, 3, 4) == (2, 6, 10)
    assert planned_steps(3, 50, 1) == (1, 2, 3)


def test_every_counts_optimizer_steps_under_gradient_accumulation(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    collector = CheckpointCollector(folder, PROMPTS, last=2, every=3)
    train(fresh(), tmp_path / "run", collector, gradient_accumulation_steps=2)
    assert read_task(folder).steps == (3, 6)


def test_epochs_rather_than_max_steps(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=2), max_steps=-1, num_train_epochs=2)
    assert read_task(folder).steps == (7, 8)


def test_a_transformers_model_with_its_own_adapter_is_collected_alike(tmp_path, fresh_base, lora_config):
    model = fresh_base()
    model.add_adapter(copy.deepcopy(lora_config), adapter_name="mine")
    folder = tmp_path / "pairs" / "law"
    train(model, tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=2, adapter_name="mine"))
    keys = load_file(folder / "checkpoints" / "step-00000006.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert read_task(folder).steps == (5, 6)


def test_a_bf16_adapter_is_stored_in_float32(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    model = fresh().to(torch.bfloat16)
    train(model, tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1))
    stored = load_file(folder / "checkpoints" / "step-00000006.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(stored[key], tensor.float()) for key, tensor in adapter_of(model).items())


def test_a_loop_of_ones_own(tmp_path, trained_like):
    folder = tmp_path / "pairs" / "law"
    model = trained_like(0)
    writer = PairWriter(folder, PROMPTS, AdapterLayout.from_model(model), task="the law of the sea")
    with pytest.raises(PairsFolderError, match="call begin"):
        writer.add(model, 1)
    writer.begin(initialization="sha256:0")
    writer.add(model, 1)
    writer.add(adapter_of(trained_like(1)), 2)
    writer.close()
    record = read_task(folder)
    assert (record.task, record.steps, record.initialization) == ("the law of the sea", (1, 2), "sha256:0")


# The common initialisation


def test_all_tasks_start_from_the_first_ones_fresh_adapter(tmp_path, fresh):
    starts = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 0:
                starts.append(adapter_of(kwargs["model"]))

    models = [fresh(seed=10), fresh(seed=11), fresh(seed=10)]
    drawn = [adapter_of(model) for model in models]
    assert not equal(drawn[0], drawn[1])
    pairs = tmp_path / "pairs"
    before = None
    for model, name in zip(models, ("law", "medicine", "tax"), strict=True):
        train(model, tmp_path / "run", CheckpointCollector(pairs / name, PROMPTS, last=1), Watch())
        written = {path.name: path.read_bytes() for path in (pairs / "initialization").iterdir()}
        assert before is None or written == before
        before = written
    assert all(equal(start, drawn[0]) for start in starts) and len(starts) == 3
    assert equal(load_file(pairs / "initialization" / "adapter_model.safetensors"), drawn[0])
    assert AdapterLayout.from_folder(pairs / "initialization").difference(AdapterLayout.from_model(models[0])) is None
    # From one start, on the same data, two models take the same way: the optimiser did step what was reset.
    assert equal(adapter_of(models[0]), adapter_of(models[1]))
    assert len({read_task(pairs / name).initialization for name in ("law", "medicine", "tax")}) == 1
    assert [path for path in pairs.iterdir() if path.name.startswith(".")] == []


def test_the_common_initialisation_can_be_declined(tmp_path, trained_like):
    folder = tmp_path / "pairs" / "law"
    model = trained_like(0)
    start = adapter_of(model)
    collector = CheckpointCollector(folder, PROMPTS, last=1, common_initialization=False)
    train(model, tmp_path / "run", collector, learning_rate=0.0)
    assert equal(adapter_of(model), start)
    assert not (tmp_path / "pairs" / "initialization").exists()
    assert read_task(folder).initialization is None


def test_a_trained_adapter_is_not_thrown_away_for_the_common_initialisation(tmp_path, trained_like):
    model = trained_like(0)
    start = adapter_of(model)
    with pytest.raises(PairsFolderError, match=r"not fresh.*common_initialization=False"):
        train(model, tmp_path / "run", CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS))
    assert equal(adapter_of(model), start)
    assert not (tmp_path / "pairs").exists()


def test_an_adapter_that_already_is_the_common_initialisation_is_taken_whatever_it_holds(tmp_path, trained_like):
    model = trained_like(0)
    digest = use_common_initialization(model, tmp_path / "pairs")
    assert has_common_initialization(model, tmp_path / "pairs")
    folder = tmp_path / "pairs" / "law"
    train(model, tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1))
    assert read_task(folder).initialization == digest


def test_another_layout_than_the_common_initialisation_is_refused(tmp_path, fresh):
    use_common_initialization(fresh(), tmp_path / "pairs")
    folder = tmp_path / "pairs" / "law"
    with pytest.raises(LayoutError, match=r"initialization.*model\.layers\.0\.mlp\.down_proj.* rank 3 .* and 5 "):
        train(fresh(r=5), tmp_path / "run", CheckpointCollector(folder, PROMPTS))
    assert not folder.exists()


def test_an_optimizer_with_copies_of_the_weights_is_refused(tmp_path, fresh):
    model = fresh()
    copies = [parameter.detach().clone().requires_grad_() for parameter in live_state_dict(model, "default").values()]
    collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS)
    state = TrainerState(max_steps=6)
    with pytest.raises(PairsFolderError, match=r"copies.*before you create the Trainer"):
        collector.on_train_begin(
            SimpleNamespace(), state, TrainerControl(), model=model, optimizer=torch.optim.SGD(copies)
        )
    # The mend that it names.
    use_common_initialization(model, tmp_path / "pairs")
    collector.on_train_begin(
        SimpleNamespace(), state, TrainerControl(), model=model, optimizer=torch.optim.SGD(copies)
    )


def test_a_trainer_that_begins_anew_within_one_call_starts_from_the_initialisation_again(tmp_path, fresh):
    """As `auto_find_batch_size` makes it do when memory runs out after some steps."""
    model = fresh()
    start = adapter_of(model)
    collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS, last=6)
    state = TrainerState(max_steps=6)
    collector.on_train_begin(SimpleNamespace(), state, TrainerControl(), model=model)
    with torch.no_grad():
        for tensor in live_state_dict(model, "default").values():
            tensor.add_(1.0)
    state.global_step = 1
    collector.on_step_end(SimpleNamespace(), state, TrainerControl(), model=model)
    state.global_step = 0
    collector.on_train_begin(SimpleNamespace(), state, TrainerControl(), model=model)
    assert equal(adapter_of(model), start)
    assert stored_steps(tmp_path / "pairs" / "law") == ()


def in_child_process(function: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


@needs_fork
def test_processes_that_start_at_once_end_with_the_same_initialisation(tmp_path, fresh):
    processes, rounds = 3, 15
    barrier = multiprocessing.get_context("fork").Barrier(processes)

    def race(number: int) -> None:
        torch.set_num_threads(1)
        digests = []
        for turn in range(rounds):
            model = models[number]
            torch.nn.init.normal_(next(iter(live_state_dict(model, "default").values())), std=1.0 + number + turn)
            barrier.wait(timeout=60)
            digest = use_common_initialization(model, tmp_path / str(turn))
            assert digest == adapter_digest(live_state_dict(model, "default"))
            digests.append(digest)
        (tmp_path / f"digests-{number}").write_text(" ".join(digests))

    models = [fresh(seed) for seed in range(processes)]
    children = [in_child_process(race, number) for number in range(processes)]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    digests = [(tmp_path / f"digests-{number}").read_text().split() for number in range(processes)]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == rounds
    for turn in range(rounds):
        assert [path.name for path in (tmp_path / str(turn)).iterdir()] == ["initialization"]


@needs_fork
def test_all_processes_of_a_distributed_run_start_from_the_initialisation_though_one_alone_reads_it(tmp_path, fresh):
    def worker(rank: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=rank, world_size=2
        )
        # What the other process sees of the disk does not matter.
        folder = tmp_path / f"pairs-{rank}" / "law"
        state = TrainerState(max_steps=6, is_world_process_zero=rank == 0)
        collector = CheckpointCollector(folder, PROMPTS)
        collector.on_train_begin(SimpleNamespace(), state, TrainerControl(), model=models[rank])
        (tmp_path / f"digest-{rank}").write_text(adapter_digest(live_state_dict(models[rank], "default")))
        torch.distributed.destroy_process_group()

    models = [fresh(1), fresh(2)]
    expected = use_common_initialization(fresh(3), tmp_path / "pairs-0")
    children = [in_child_process(worker, rank) for rank in range(2)]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [(tmp_path / f"digest-{rank}").read_text() for rank in range(2)] == [expected, expected]
    assert not (tmp_path / "pairs-1").exists()


# Interruption


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
        real = peft_dnd.files.save_file

        def save_half(tensors: Any, path: Path, metadata: Any) -> None:
            real(tensors, path, metadata=metadata)
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(9)

        peft_dnd.files.save_file = save_half
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

    monkeypatch.setattr("peft_dnd.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        writer.add(model, 1)
    assert files_of(folder) == before


# Refusals


def test_nan_in_the_adapter_names_the_tensor_and_the_step(tmp_path, fresh):
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 6:
                with torch.no_grad():
                    live_state_dict(kwargs["model"], "default")[key].view(-1)[0] = float("nan")

    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    folder = tmp_path / "pairs" / "law"
    with pytest.raises(WeightValueError, match=rf"'law' at step 6 holds 1 NaN .*{re.escape(key)}"):
        train(fresh(), tmp_path / "run", Poison(), CheckpointCollector(folder, PROMPTS, last=2))
    assert stored_steps(folder) == (5,) and not read_task(folder).complete


@pytest.mark.parametrize(
    ("prompts", "error"),
    [([], PromptError), (["a", " "], PromptError), ("one", PromptTypeError), ([1], PromptTypeError)],
)
def test_bad_prompts_are_refused_before_training(tmp_path, prompts, error):
    with pytest.raises(error):
        CheckpointCollector(tmp_path / "law", prompts)


@pytest.mark.parametrize("setting", [{"last": 0}, {"every": 0}])
def test_impossible_numbers_are_refused(tmp_path, setting):
    with pytest.raises(GeneratorConfigError, match="at least 1"):
        CheckpointCollector(tmp_path / "law", PROMPTS, **setting)


def test_a_model_without_that_adapter_is_refused(tmp_path, fresh, fresh_base):
    folder = tmp_path / "pairs" / "law"
    with pytest.raises(LayoutError, match=r"'other'.*'default'"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, adapter_name="other"))
    with pytest.raises(LayoutError):
        train(fresh_base(), tmp_path / "run", CheckpointCollector(folder, PROMPTS))
    assert not folder.exists()


def test_what_a_generator_cannot_write_is_refused(tmp_path, fresh):
    with pytest.raises(LayoutError, match="use_dora"):
        train(fresh(use_dora=True), tmp_path / "run", CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS))


def test_sharded_weights_are_refused(tmp_path, fresh):
    model = fresh()
    module = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    module.weight = nn.Parameter(torch.empty(0))
    collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS)
    with pytest.raises(LayoutError, match=r"layers\.0\.self_attn\.q_proj"):
        collector.on_train_begin(SimpleNamespace(), TrainerState(max_steps=6), TrainerControl(), model=model)


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path, fresh):
    folder = tmp_path / "adapter"
    fresh().save_pretrained(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(PairsFolderError, match=r"no task's folder.*README.md|no task's folder.*adapter_config"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS))
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(PairsFolderError, match="'initialization' cannot be"):
        PairWriter(tmp_path / "initialization", PROMPTS, AdapterLayout.from_model(fresh()))


def test_only_the_main_process_writes(tmp_path, fresh):
    collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS)
    state = TrainerState(max_steps=1, is_world_process_zero=False)
    model = fresh()
    collector.on_train_begin(SimpleNamespace(), state, TrainerControl(), model=model)
    state.global_step = 1
    for event in ("on_step_end", "on_save", "on_train_end"):
        getattr(collector, event)(SimpleNamespace(), state, TrainerControl(), model=model)
    assert not (tmp_path / "pairs").exists()


def test_a_task_written_by_a_newer_version_is_not_overwritten(tmp_path, fresh):
    folder = tmp_path / "pairs" / "law"
    train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1))
    data = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(data | {"format_version": 2, "peft_dnd_version": "9.9"}))
    with pytest.raises(ValueError, match=r"format 2.*peft_dnd 9\.9.*up to 1.*pip install"):
        train(fresh(), tmp_path / "run", CheckpointCollector(folder, PROMPTS, last=1, overwrite=True))
