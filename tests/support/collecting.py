# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs, and pairs folders without any, for the tests of collecting and of the data set."""

from __future__ import annotations

import copy
import multiprocessing
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.pairs.writer import PairWriter


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks the test process")
TASKS = {"law": 3, "medicine": 1, "task 2": 2, "task 10": 2}
POOL = 7
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


def fresh_adapter(
    fresh_base: Callable[[], nn.Module], lora_config: LoraConfig, seed: int = 0, **changes: Any
) -> PeftModel:
    """A base model with a fresh adapter drawn from a seed."""
    torch.manual_seed(seed)
    config = copy.deepcopy(lora_config)
    for name, value in changes.items():
        setattr(config, name, value)
    return get_peft_model(fresh_base(), config)


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


def in_child_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    def with_bars_of_its_own() -> None:
        # A thread of the parent, such as tqdm's monitor, may hold the lock of bars at the fork, and is not here.
        tqdm.set_lock(threading.RLock())
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=with_bars_of_its_own)
    process.start()
    return process


def adapter(layout: AdapterLayout, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tensor.key: torch.randn(tensor.shape, generator=generator) for tensor in layout.tensors}


def write(
    folder: Path, layout: AdapterLayout, checkpoints: int, *, seed: int = 0, initialization: str | None = "sha256:0"
) -> None:
    """Write a task with checkpoints drawn from the seeds that follow `seed`."""
    writer = PairWriter(folder, [f"{folder.name} prompt {i}" for i in range(POOL)], layout)
    writer.begin(initialization)
    for step in range(1, checkpoints + 1):
        writer.add(adapter(layout, seed + step), step)
    writer.close()


def write_pairs(folder: Path, layout: AdapterLayout) -> Path:
    """Write a pairs folder of the tasks in `TASKS`, which gives the number of checkpoints of each."""
    for number, (task, checkpoints) in enumerate(TASKS.items()):
        write(folder / task, layout, checkpoints, seed=100 * number)
    return folder
