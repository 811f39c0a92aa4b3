# SPDX-License-Identifier: Apache-2.0
"""Collecting checkpoints from real, tiny training runs."""

from __future__ import annotations

import copy
import functools
import json
import re
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
    files_of,
    fresh_adapter,
    train,
)
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import (
    GeneratorConfigError,
    LayoutError,
    PairsFolderError,
    PromptError,
    PromptTypeError,
    WeightValueError,
)
from peft_dnd.pairs.collector import CheckpointCollector, planned_steps
from peft_dnd.pairs.dataset import PromptCheckpointDataset
from peft_dnd.pairs.folder import read_task, stored_steps
from peft_dnd.pairs.prompt_pool import read_prompts
from peft_dnd.pairs.writer import PairWriter


@pytest.fixture
def fresh(fresh_base: Callable[[], nn.Module], lora_config: LoraConfig) -> Callable[..., PeftModel]:
    return functools.partial(fresh_adapter, fresh_base, lora_config)


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
    collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS)
    with pytest.raises(LayoutError, match="alora_invocation_tokens"):
        train(fresh(alora_invocation_tokens=[1]), tmp_path / "run", collector)


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
