# SPDX-License-Identifier: Apache-2.0
"""The adapter that the training of all tasks starts from."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.collecting import (
    PROMPTS,
    adapter_of,
    equal,
    fresh_adapter,
    in_child_process,
    needs_fork,
    train,
)
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import (
    LayoutError,
    PairsFolderError,
)
from peft_dnd.pairs.collector import CheckpointCollector
from peft_dnd.pairs.folder import adapter_digest, read_task, stored_steps
from peft_dnd.pairs.initialization import has_common_initialization, use_common_initialization


@pytest.fixture
def fresh(fresh_base: Callable[[], nn.Module], lora_config: LoraConfig) -> Callable[..., PeftModel]:
    return functools.partial(fresh_adapter, fresh_base, lora_config)


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
