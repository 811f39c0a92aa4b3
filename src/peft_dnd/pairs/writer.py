# SPDX-License-Identifier: Apache-2.0
"""The writer of one task's folder, for any training loop; the collector calls it from a `Trainer`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.layout import AdapterLayout
from ..adapters.lora import ADAPTER_CONFIG_NAME
from ..errors import PairsFolderError
from ..storage.files import PathLike, staged_directory
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import check_prompts
from ..text.prompts_and_answers import check_answers
from .examples import EXAMPLES_NAME, write_examples
from .folder import (
    TASK_NAME,
    TaskRecord,
    adapter_digest,
    checkpoint_path,
    may_be_task,
    read_task,
    remove_checkpoints,
    stored_steps,
    write_matrices,
    write_task,
)
from .initialization import whole_matrices
from .prompt_pool import write_prompts


logger = logging.getLogger(__name__)


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
        examples: The task's examples, as for [`write_examples`].
        answers: The prompts' answers, one each, for a generator that reads them too.

    Raises:
        PromptError: If there are no prompts, or empty ones, or not one answer for each.
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
        prompts: PromptsLike,
        layout: AdapterLayout,
        *,
        task: str | None = None,
        adapter_name: str = "default",
        overwrite: bool = False,
        resume_from: tuple[nn.Module | Mapping[str, torch.Tensor], int] | None = None,
        examples: Iterable[Mapping[str, Any]] | None = None,
        answers: PromptsLike | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.prompts = check_prompts(prompts)
        self.answers = None if answers is None else check_answers(self.prompts, answers)
        self.layout = layout
        self.task = self.folder.name if task is None else task
        self.adapter_name = adapter_name
        self.examples = examples
        self._begun = False
        self._record = TaskRecord(self.task)
        self._last_kept_step = 0
        found = task_record(self.folder)
        if found is not None and not (resume_from is not None and self._resume(found, *resume_from)):
            _check_may_replace(found, self.folder, overwrite)

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
        write_prompts(self.folder, self.prompts, self.answers)
        if self.examples is not None:
            write_examples(self.folder, self.examples)
        elif self._last_kept_step == 0:
            (self.folder / EXAMPLES_NAME).unlink(missing_ok=True)
        with staged_directory(self.folder) as staged:
            self.layout.peft_config().save_pretrained(str(staged))

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

    def _resume(self, found: TaskRecord, adapter: nn.Module | Mapping[str, torch.Tensor], step: int) -> bool:
        """Take up what a run wrote up to a step, if it is the one that wrote the folder."""
        if found.resume_points.get(step) != adapter_digest(self._state_dict(adapter)):
            logger.warning(
                "Training resumes at step %d, but %s was written by another run, or noted no checkpoint there.",
                step,
                self.folder,
            )
            return False
        self._record = dataclasses.replace(found, task=self.task, complete=False, steps=())
        self._last_kept_step = step
        return True

    def _check_begun(self) -> None:
        if not self._begun:
            raise PairsFolderError(f"The folder of task {self.task!r} is not laid out yet: call begin() first.")

    def _state_dict(self, adapter: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return whole_matrices(adapter, self.adapter_name) if isinstance(adapter, nn.Module) else adapter


def write_task_without_checkpoints(
    folder: PathLike,
    prompts: PromptsLike,
    examples: Iterable[Mapping[str, Any]],
    *,
    answers: PromptsLike | None = None,
    task: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder of a task that has no adapters: a generator can be fitted on the task's own loss all the same.

    Args:
        folder: The task's folder inside the pairs folder, for instance `"pairs/law"`.
        prompts: The task's pool of unlabelled prompts.
        examples: Its examples, as for [`write_examples`].
        answers: The prompts' answers, one each, for a generator that reads them too.
        task: The task's name; by default that of the folder.
        overwrite: Whether to replace a complete task.

    Raises:
        PromptError: If there are no prompts, or empty ones.
        PromptTypeError: If they are no sequence of strings.
        PairsFolderError: If there are no examples, the task is complete and `overwrite` is off, or the folder holds
            something else.
    """
    folder = Path(folder).absolute()
    prompts = check_prompts(prompts)
    answers = None if answers is None else check_answers(prompts, answers)
    if (found := task_record(folder)) is not None:
        _check_may_replace(found, folder, overwrite)
    record = TaskRecord(folder.name if task is None else task)
    write_task(folder, record)
    remove_checkpoints(folder)
    (folder / ADAPTER_CONFIG_NAME).unlink(missing_ok=True)
    write_prompts(folder, prompts, answers)
    write_examples(folder, examples)
    write_task(folder, dataclasses.replace(record, complete=True))


def task_record(folder: Path) -> TaskRecord | None:
    """What the folder's `task.json` says; `None` where there is no folder yet, or an empty one.

    Raises:
        PairsFolderError: If it cannot be a task's folder, or holds something else.
    """
    if not may_be_task(folder.name):
        raise PairsFolderError(f"{folder.name!r} cannot be a task's folder; name another one.")
    if (folder / TASK_NAME).is_file():
        return read_task(folder)
    strangers = [path.name for path in folder.glob("*") if not path.name.startswith(".")]
    if strangers:
        raise PairsFolderError(
            f"{str(folder)!r} is no task's folder: it has no {TASK_NAME} and holds {min(strangers)!r}. Name a folder "
            "of its own for each task, such as 'pairs/law'."
        )
    return None


def _check_may_replace(found: TaskRecord, folder: Path, overwrite: bool) -> None:
    if found.complete and not overwrite:
        raise PairsFolderError(
            f"Task {found.task!r} in {str(folder)!r} is complete, with {len(found.steps)} checkpoints. Pass "
            "overwrite=True (--overwrite) to collect it again, or name another folder."
        )
