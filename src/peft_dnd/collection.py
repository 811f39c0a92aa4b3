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
"""Collecting LoRA checkpoints: a callback for any `Trainer`, and the writer behind it for other training loops."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import GeneratorConfigError, PairsFolderError
from .files import PathLike, staged_directory
from .initialization import has_common_initialization, use_common_initialization, whole_matrices
from .layout import AdapterLayout
from .pairs import (
    INITIALIZATION_FOLDER,
    TASK_NAME,
    TaskRecord,
    adapter_digest,
    checkpoint_path,
    read_task,
    remove_checkpoints,
    stored_steps,
    write_matrices,
    write_prompts,
    write_task,
)
from .prompts import check_prompts


logger = logging.getLogger(__name__)


class CheckpointCollector(TrainerCallback):
    """Writes a task's folder of prompt-checkpoint pairs while any `Trainer`, TRL's included, trains its adapter.

    Of the last `last * every` steps it keeps every `every`-th, the final one always (arXiv 2506.16406, section 2.2:
    go on from a trained adapter and keep one after each step). What happens to a folder that is there already:

    - a task whose collection is complete is refused, unless `overwrite=True`;
    - what a run left that was cut off is cleared by a run from the start;
    - a run that is resumed from one of its own trainer checkpoints keeps what it wrote up to there, and ends with the
      files that it would have without interruption.

    In a distributed run the main process alone writes. Weights that are sharded (FSDP, DeepSpeed ZeRO-3) are refused.

    Args:
        folder: The task's folder inside the pairs folder, for instance `"pairs/arc_easy"`.
        prompts: The task's pool of unlabelled prompts.
        last: How many checkpoints to keep at most; at least 1.
        every: Steps from one to the next; at least 1. A step is an optimiser step.
        adapter_name: The adapter that is trained, by its name in the model.
        common_initialization: Whether to start the adapter from the pairs folder's common initialisation, which the
            first task to be trained there creates from its own fresh adapter. The two factors of an update are only
            determined up to an invertible matrix between them, so adapters that start apart cannot be compared entry
            by entry. Pass `False` to go on training an adapter.
        task: The task's name; by default that of the folder.
        overwrite: Whether to replace a complete task.

    Raises:
        PromptError: If there are no prompts, or empty ones.
        PromptTypeError: If they are no sequence of strings.
        GeneratorConfigError: If `last` or `every` is not positive.
        PairsFolderError: When training begins, if the folder may not be written to, or the adapter was trained before
            and would lose that to the common initialisation. When it ends, if it did so before the first of the steps
            to keep.
        LayoutError: When training begins, if the adapter is no plain LoRA, is sharded, or has another layout than the
            common initialisation.
        WeightValueError: While training, if the adapter has come to hold NaN or infinity.

    Example:
        ```python
        trainer = SFTTrainer(..., peft_config=lora, callbacks=[CheckpointCollector("pairs/law", prompts=prompts)])
        trainer.train()
        ```
    """

    def __init__(
        self,
        folder: PathLike,
        prompts: Sequence[str],
        *,
        last: int = 50,
        every: int = 1,
        adapter_name: str = "default",
        common_initialization: bool = True,
        task: str | None = None,
        overwrite: bool = False,
    ) -> None:
        if last < 1 or every < 1:
            raise GeneratorConfigError(f"last and every must be at least 1, got last={last} and every={every}.")
        self.folder = Path(folder)
        self.prompts = check_prompts(prompts)
        self.last = last
        self.every = every
        self.adapter_name = adapter_name
        self.common_initialization = common_initialization
        self.task = task
        self.overwrite = overwrite
        self._planned: tuple[int, ...] = ()
        self._writer: PairWriter | None = None
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all that can be checked, start the adapter from the common initialisation, lay out the folder."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        layout = AdapterLayout.from_model(model, self.adapter_name)
        writer = None
        if state.is_world_process_zero:
            writer = PairWriter(
                self.folder,
                self.prompts,
                layout,
                task=self.task,
                adapter_name=self.adapter_name,
                overwrite=self.overwrite,
                resume_from=(model, state.global_step) if state.global_step > 0 else None,
            )
        initialization = None
        if self.common_initialization and state.global_step == 0:
            initialization = self._initialize(model, optimizer, is_main=writer is not None)
        if writer is not None:
            self._planned = planned_steps(state.max_steps, self.last, self.every)
            writer.begin(initialization, self._planned)
            self._writer = writer
            logger.info("Keeping the adapter at %d steps, %s.", len(self._planned), _range_in_words(self._planned))
        self._begun = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the adapter, if this is one of the steps to keep."""
        if self._writer is not None and state.global_step in self._planned:
            self._writer.add(kwargs["model"], state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that the run can be resumed from here."""
        if self._writer is not None:
            self._writer.note_resume_point(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the task as complete."""
        writer, self._writer, self._begun = self._writer, None, False
        if writer is None:
            return
        missing = sorted(set(self._planned) - set(stored_steps(self.folder)))
        if missing:
            logger.warning(
                "Task %r has %d of the %d checkpoints that were to be kept; those of %s are missing, and training "
                "ended at step %d of %d. To have them all, collect again with overwrite=True, without stopping early, "
                "and resume from none but this run's own trainer checkpoints.",
                writer.task,
                len(self._planned) - len(missing),
                len(self._planned),
                _range_in_words(missing),
                state.global_step,
                state.max_steps,
            )
        writer.close()

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, is_main: bool) -> str | None:
        pairs = self.folder.absolute().parent
        digest = None
        if is_main:
            # A Trainer that begins anew within one call (auto_find_batch_size) has the same adapter to start again.
            if not self._begun and not has_common_initialization(model, pairs, self.adapter_name):
                _check_untrained(model, self.adapter_name)
                _check_optimizer_holds_adapter(model, self.adapter_name, optimizer)
            digest = use_common_initialization(model, pairs, self.adapter_name)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for matrix in whole_matrices(model, self.adapter_name).values():
                torch.distributed.broadcast(matrix.data, src=0)
        return digest


class PairWriter:
    """Writes one task's folder, for training loops that are no `Trainer`.

    Creating it only checks; [`begin`][PairWriter.begin] lays the folder out, [`close`][PairWriter.close] marks the
    task as complete. Until then a fit refuses it, and a writer that begins from the start clears it.

    Args:
        folder: The task's folder inside the pairs folder.
        prompts: The task's pool of unlabelled prompts.
        layout: The layout that all its checkpoints have.
        task: The task's name; by default that of the folder.
        adapter_name: The adapter to keep, where models are given.
        overwrite: Whether to replace a complete task.
        resume_from: The adapter (a model or a state dict) and the step at which a resumed run stands. If
            [`note_resume_point`][PairWriter.note_resume_point] has seen just these, the run is the one that wrote the
            folder, and what it wrote up to that step is kept.

    Raises:
        PromptError: If there are no prompts, or empty ones.
        PromptTypeError: If they are no sequence of strings.
        PairsFolderError: If the task is complete and `overwrite` is off, or the folder holds something else.

    Example:
        ```python
        writer = PairWriter("pairs/law", prompts, AdapterLayout.from_model(model))
        writer.begin(initialization=use_common_initialization(model, "pairs"))
        for step in range(1, 101):
            ...
            if step > 50:
                writer.add(model, step)
        writer.close()
        ```
    """

    def __init__(
        self,
        folder: PathLike,
        prompts: Sequence[str],
        layout: AdapterLayout,
        *,
        task: str | None = None,
        adapter_name: str = "default",
        overwrite: bool = False,
        resume_from: tuple[nn.Module | Mapping[str, torch.Tensor], int] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.prompts = check_prompts(prompts)
        self.layout = layout
        self.task = self.folder.name if task is None else task
        self.adapter_name = adapter_name
        self._begun = False
        self._record = TaskRecord(self.task)
        self._last_kept_step = 0
        found = _read_record(self.folder)
        if found is None:
            return
        if resume_from is not None:
            adapter, step = resume_from
            if found.resume_points.get(step) == adapter_digest(self._state_dict(adapter)):
                self._record = dataclasses.replace(found, task=self.task, complete=False, steps=())
                self._last_kept_step = step
                return
            logger.warning(
                "Training resumes at step %d, but %s was written by another run, or noted no checkpoint there.",
                step,
                self.folder,
            )
        if found.complete and not overwrite:
            raise PairsFolderError(
                f"Task {found.task!r} in {str(self.folder)!r} is complete, with {len(found.steps)} checkpoints. Pass "
                "overwrite=True to collect it again, or name another folder."
            )

    def begin(self, initialization: str | None = None, planned: Collection[int] | None = None) -> None:
        """Lay out the folder, without what it held before that is not kept.

        Args:
            initialization: What [`use_common_initialization`] returned, if the adapter was started with it. A resumed
                run has told already.
            planned: The steps that are to be kept, if that is known: a resumed run then drops what it kept of others.
        """
        self._begun = True
        if initialization is not None:
            self._record = dataclasses.replace(self._record, initialization=initialization)
        # First of all, so that whatever stops the rest, the folder does not pass for a finished one.
        write_task(self.folder, self._record)
        before = [step for step in stored_steps(self.folder) if step <= self._last_kept_step]
        remove_checkpoints(self.folder, keep=[step for step in before if planned is None or step in planned])
        write_prompts(self.folder, self.prompts)
        with staged_directory(self.folder) as staged:
            self.layout.lora_config().save_pretrained(str(staged))

    def add(self, adapter: nn.Module | Mapping[str, torch.Tensor], step: int) -> None:
        """Keep the adapter as it is after a training step, in float32.

        Args:
            adapter: The model, or a state dict with PEFT's on-disk keys.
            step: The step, at least 1.

        Raises:
            LayoutError: If the adapter does not have the writer's layout.
            WeightValueError: If it holds NaN or infinity.
        """
        self._check_begun()
        state_dict = self._state_dict(adapter)
        self.layout.check_state_dict(state_dict, source=f"The adapter of task {self.task!r} at step {step}")
        write_matrices(checkpoint_path(self.folder, step), state_dict)

    def note_resume_point(self, adapter: nn.Module | Mapping[str, torch.Tensor], step: int) -> None:
        """Note that training can be resumed with this adapter after this step."""
        self._check_begun()
        points = {**self._record.resume_points, step: adapter_digest(self._state_dict(adapter))}
        self._record = dataclasses.replace(self._record, resume_points=points)
        write_task(self.folder, self._record)

    def close(self) -> None:
        """Mark the task as complete.

        Raises:
            PairsFolderError: If no checkpoint was kept.
        """
        self._check_begun()
        steps = stored_steps(self.folder)
        if not steps:
            raise PairsFolderError(
                f"Not one checkpoint of task {self.task!r} was kept: training ended before the first of the steps to "
                f"keep. {str(self.folder)!r} stays incomplete. Train for just as many steps as it takes, without "
                "stopping early, or keep more of the last ones."
            )
        self._record = dataclasses.replace(self._record, complete=True, steps=steps)
        write_task(self.folder, self._record)

    def _check_begun(self) -> None:
        if not self._begun:
            raise PairsFolderError(f"The folder of task {self.task!r} is not laid out yet: call begin() first.")

    def _state_dict(self, adapter: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return whole_matrices(adapter, self.adapter_name) if isinstance(adapter, nn.Module) else adapter


def planned_steps(max_steps: int, last: int, every: int) -> tuple[int, ...]:
    """The steps to keep, in rising order.

    >>> planned_steps(max_steps=100, last=3, every=10)
    (80, 90, 100)
    """
    return tuple(range(max_steps, 0, -every))[:last][::-1]


def _check_untrained(model: nn.Module, adapter_name: str) -> None:
    matrices = whole_matrices(model, adapter_name)
    for module in AdapterLayout.from_model(model, adapter_name).modules:
        if all(bool(matrices[tensor.key].any()) for tensor in module.tensors):
            raise PairsFolderError(
                f"Adapter {adapter_name!r} is not fresh: neither A nor B of {module.name!r} is zero. The common "
                "initialisation would overwrite what it has learned. To go on training it, pass "
                "common_initialization=False (and give it the common start before its first training, with "
                "use_common_initialization). To start afresh all the same, call "
                "use_common_initialization(model, pairs) before you create the Trainer."
            )


def _check_optimizer_holds_adapter(
    model: nn.Module, adapter_name: str, optimizer: torch.optim.Optimizer | None
) -> None:
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(matrix) in held for matrix in whole_matrices(model, adapter_name).values()):
        raise PairsFolderError(
            f"The optimizer works on copies of adapter {adapter_name!r} (DeepSpeed and FSDP do so), which would undo "
            "the common initialisation. Call use_common_initialization(model, pairs) before you create the Trainer."
        )


def _read_record(folder: Path) -> TaskRecord | None:
    if folder.name == INITIALIZATION_FOLDER or folder.name.startswith("."):
        raise PairsFolderError(f"{folder.name!r} cannot be a task's folder; name another one.")
    if (folder / TASK_NAME).is_file():
        return read_task(folder)
    strangers = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if strangers:
        raise PairsFolderError(
            f"{str(folder)!r} is no task's folder: it has no {TASK_NAME} and holds {sorted(strangers)[0]!r}. Name a "
            "folder of its own for each task, such as 'pairs/law'."
        )
    return None


def _range_in_words(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
