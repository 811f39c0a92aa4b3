# SPDX-License-Identifier: Apache-2.0
"""The pairs folder's format on disk, written down here and only here: finding, reading and checking what lies in it.

    pairs/
      initialization/                       the adapter that all tasks started from, as PEFT saves one
      <task>/task.json                      what the task is, whether its collection is finished, which steps it has
      <task>/prompts.jsonl                  its pool of prompts, one {"prompt": "..."} a line, or each with its answer:
                                            {"prompt": "...", "answer": "..."}
      <task>/examples.jsonl                 where given: what the base's forward takes, one example a line
      <task>/distillation.jsonl, .json      where made: what a teacher said to inputs of the task; see `distillation`
      <task>/origin.json                    where made of adapters that existed already: which, and what became of them
      <task>/adapter_config.json            plain PEFT, so that with it each checkpoint is an adapter
      <task>/checkpoints/step-00000051.safetensors

Every file is written whole or not at all, and `task.json` says that a task is complete only once all else is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.layout import AdapterLayout
from ..adapters.layouts import layout_from_shapes
from ..adapters.names import natural_key
from ..errors import CorruptFileError, FormatVersionError, LayoutError, PairsFolderError
from ..storage.files import PathLike, read_json, read_safetensors_shapes, write_json, write_safetensors
from ..text.prompts import check_prompts
from ..version import __version__
from .distillation import load_distillation
from .examples import EXAMPLES_NAME, TaskExamples
from .prompt_pool import PROMPTS_NAME, read_answers, read_prompts


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TASK_NAME = "task.json"
CHECKPOINTS_FOLDER = "checkpoints"
INITIALIZATION_FOLDER = "initialization"

# `files` writes under hidden names first; a process that is killed in between leaves one behind.
_LEFTOVER_PATTERN = re.compile(r"\..*\.safetensors")
_CHECKPOINT_PATTERN = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class TaskRecord:
    """What a task's `task.json` says.

    Attributes:
        task: The task's name.
        complete: Whether its collection came to an end; until then the folder is not read as training data.
        steps: The training steps whose adapters are there, in rising order; none for a task that has examples only.
        initialization: Digest of the common initialisation that the task's training started from; `None` if it started
            from another adapter.
        resume_points: Training step at which the trainer saved itself -> digest of the adapter at that step. A resumed
            run shows by them that it is the run that wrote the folder.
        peft_dnd_version: Version of the library that wrote the folder.
    """

    task: str
    complete: bool = False
    steps: tuple[int, ...] = ()
    initialization: str | None = None
    resume_points: Mapping[int, str] = field(default_factory=dict)
    peft_dnd_version: str = __version__


@dataclass(frozen=True)
class Task:
    """A complete task as it was read and checked.

    Attributes:
        name: Its name.
        prompts: Its pool of prompts.
        checkpoints: The files of its checkpoints, in the order of their steps.
        layout: The layout that they share; `None` where there are no checkpoints.
        initialization: As in its [`TaskRecord`].
        examples: Its examples, for a fit on the base's own loss, if it has any.
        distillation: What a teacher said to inputs of the task, for a fit by context distillation, if any did.
        answers: The answers to its prompts, one each, if it has any.
        condition_text: Which texts stand in `prompts`, one of `CONDITION_TEXTS`.
    """

    name: str
    prompts: tuple[str, ...]
    checkpoints: tuple[Path, ...]
    layout: AdapterLayout | None
    initialization: str | None
    examples: TaskExamples | None = None
    distillation: TaskExamples | None = None
    answers: tuple[str, ...] | None = None
    condition_text: str = "prompts"


def find_tasks(pairs: PathLike, names: Collection[str] | None = None) -> dict[str, Path]:
    """Find the tasks of a pairs folder.

    Args:
        pairs: The pairs folder.
        names: The tasks wanted; all by default.

    Returns:
        Task name -> its folder, in natural order of the names.

    Raises:
        PairsFolderError: If there is no such folder, no task in it, none of a name, two of one name, or, where all are
            wanted, a folder in it that is no task's.
        FormatVersionError: If a newer version of the library wrote a task.
        CorruptFileError: If a `task.json` is unreadable.
    """
    folders = _folders_in(pairs)
    if names is not None and not names:
        raise PairsFolderError(f"No task of {str(pairs)!r} is asked for: tasks is empty. Name some, or leave it out.")
    found: dict[str, Path] = {}
    for folder in folders:
        if names is not None and not (folder / TASK_NAME).is_file():
            continue
        name = read_task(folder).task
        if name in found:
            raise PairsFolderError(
                f"{str(found[name])!r} and {str(folder)!r} both call their task {name!r}. Remove one of them, or "
                f"change the name in its {TASK_NAME}."
            )
        found[name] = folder
    wanted = sorted(found if names is None else names, key=natural_key)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        known = ", ".join(map(repr, sorted(found, key=natural_key)))
        raise PairsFolderError(f"There is no task {unknown[0]!r} in {str(pairs)!r}. Its tasks: {known}.")
    return {name: found[name] for name in wanted}


def may_be_task(name: str) -> bool:
    """Whether a folder of a pairs folder may be a task's, going by its name."""
    return name != INITIALIZATION_FOLDER and not name.startswith(".")


def load_task(folder: PathLike) -> Task:
    """Read a task and check that it can be fitted to: everything but the weights, of which the headers are read.

    Raises:
        PairsFolderError: If it is incomplete, lacks a checkpoint, has no prompts, or nothing to be fitted to: no
            checkpoints, no examples and no teacher's answers.
        PromptError: If a prompt is empty.
        LayoutError: If its checkpoints differ in their layouts.
        CorruptFileError: If a file is unreadable, for instance cut short.
        FormatVersionError: If a newer version of the library wrote it.
    """
    folder = Path(folder)
    record = read_task(folder)
    examples = TaskExamples(folder / EXAMPLES_NAME) if (folder / EXAMPLES_NAME).is_file() else None
    distillation = load_distillation(folder)
    if not record.complete or not (record.steps or examples or distillation):
        raise PairsFolderError(
            f"Task {record.task!r} in {str(folder)!r} is incomplete: its training did not come to its end, and holds "
            f"{len(stored_steps(folder))} checkpoints so far. Train it again or resume it, or leave it out with "
            "tasks=[...]."
        )
    checkpoints = tuple(checkpoint_path(folder, step) for step in record.steps)
    missing = [path for path in checkpoints if not path.is_file()]
    if missing:
        raise PairsFolderError(
            f"Task {record.task!r} lacks {len(missing)} of its {len(checkpoints)} checkpoints, {str(missing[0])!r} "
            "for one. Restore them, or collect the task again."
        )
    prompts = check_prompts(read_prompts(folder), f"{str(folder / PROMPTS_NAME)!r}")
    layout = _shared_layout(folder, checkpoints) if checkpoints else None
    answers = read_answers(folder)
    return Task(
        record.task,
        prompts,
        checkpoints,
        layout,
        record.initialization,
        examples=examples,
        distillation=distillation,
        answers=answers,
    )


def check_alike(tasks: Sequence[Task]) -> None:
    """Make sure that the adapters of all tasks can be written by one generator.

    Raises:
        LayoutError: If their layouts differ; the first difference is named.
    """
    collected = [(task, task.layout) for task in tasks if task.layout is not None]
    for task, layout in collected[1:]:
        first, first_layout = collected[0]
        difference = first_layout.difference(layout)
        if difference is not None:
            raise LayoutError(
                f"Tasks {first.name!r} ({str(first.checkpoints[0])!r}) and {task.name!r} "
                f"({str(task.checkpoints[0])!r}) have adapters of different layouts: {difference}. One generator "
                "writes one layout: collect both with one LoRA configuration and one base model, or choose among "
                "them with tasks=[...]."
            )
        if task.initialization != first.initialization:
            logger.warning(
                "Tasks %r and %r did not start from one common initialisation, so their adapters cannot well be "
                "compared entry by entry, and a generator will fit them badly. Collect them in one pairs folder, with "
                "common_initialization=True.",
                first.name,
                task.name,
            )
            return


def checkpoint_path(folder: PathLike, step: int) -> Path:
    """Where a task keeps the adapter of a training step.

    >>> checkpoint_path("pairs/law", 51).name
    'step-00000051.safetensors'
    """
    return Path(folder) / CHECKPOINTS_FOLDER / f"step-{step:08d}.safetensors"


def stored_steps(folder: PathLike) -> tuple[int, ...]:
    """The training steps of which a task's folder holds an adapter, in rising order, whatever its `task.json` says."""
    names = [path.name for path in (Path(folder) / CHECKPOINTS_FOLDER).glob("*")]
    return tuple(sorted(int(match[1]) for name in names if (match := _CHECKPOINT_PATTERN.fullmatch(name))))


def remove_checkpoints(folder: PathLike, keep: Collection[int] = ()) -> None:
    """Remove a task's checkpoints, but for those of the steps to keep, and what killed processes left of theirs."""
    for path in list((Path(folder) / CHECKPOINTS_FOLDER).glob("*")):
        match = _CHECKPOINT_PATTERN.fullmatch(path.name)
        if _LEFTOVER_PATTERN.fullmatch(path.name) or (match and int(match[1]) not in keep):
            path.unlink(missing_ok=True)


def write_task(folder: PathLike, record: TaskRecord) -> None:
    """Write a task's `task.json`, whole or not at all."""
    data = {"format_version": FORMAT_VERSION, **asdict(record)}
    data["resume_points"] = {str(step): digest for step, digest in sorted(record.resume_points.items())}
    write_json(Path(folder) / TASK_NAME, data)


def read_task(folder: PathLike) -> TaskRecord:
    """Read a task's `task.json`.

    Raises:
        PairsFolderError: If there is none.
        FormatVersionError: If a newer version of the library wrote it.
        CorruptFileError: If it is not readable, or lacks a field.
    """
    path = Path(folder) / TASK_NAME
    if not path.is_file():
        raise PairsFolderError(
            f"There is no {TASK_NAME} in {str(folder)!r}, so it is no task of a pairs folder, or its collection was "
            "cut off before it began. Collect the task again, or remove that folder."
        )
    data = read_json(path)
    _check_format_version(data, path)
    try:
        return TaskRecord(
            task=_typed(data["task"], str),
            complete=_typed(data["complete"], bool),
            steps=tuple(sorted(_step(step) for step in data["steps"])),
            initialization=_typed(data.get("initialization"), str | None),
            resume_points={int(step): digest for step, digest in data.get("resume_points", {}).items()},
            peft_dnd_version=str(data.get("peft_dnd_version", "unknown")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{str(path)!r} does not describe a task of a pairs folder: {error!r:.200}. Collect the task again."
        ) from error


def write_matrices(path: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's matrices in float32 to a safetensors file, whole or not at all."""
    write_safetensors(path, {key: tensor.detach().to("cpu", torch.float32) for key, tensor in state_dict.items()})


def adapter_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """A digest of an adapter's keys and weights, the same for equal weights in any dtype, on any device.

    >>> adapter_digest({"a": torch.ones(2)}) == adapter_digest({"a": torch.ones(2, dtype=torch.bfloat16)})
    True
    """
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _folders_in(pairs: PathLike) -> list[Path]:
    """The folders in a pairs folder, of which one at least is a task's."""
    if not isinstance(pairs, (str, os.PathLike)) or not os.fspath(pairs):
        raise PairsFolderError(f"A pairs folder is named by a string or a path; got {pairs!r}.")
    pairs = Path(pairs)
    if not pairs.is_dir():
        raise PairsFolderError(
            f"There is no folder {str(pairs)!r}. Expected a pairs folder, with one folder for each task, as "
            "CheckpointCollector writes it."
        )
    if (pairs / TASK_NAME).is_file():
        raise PairsFolderError(f"{str(pairs)!r} is the folder of one task. Pass the folder that it lies in.")
    folders = sorted(path for path in pairs.iterdir() if path.is_dir() and may_be_task(path.name))
    if not any((folder / TASK_NAME).is_file() for folder in folders):
        # Whoever named another kind of folder must not be told to remove what is in it.
        raise PairsFolderError(
            f"{str(pairs)!r} is no pairs folder: there is no task at all in it, that is, no folder with a "
            f"{TASK_NAME}. Expected one folder for each task, as CheckpointCollector writes it; found none."
        )
    return folders


def _shared_layout(folder: Path, checkpoints: Sequence[Path]) -> AdapterLayout:
    shapes = read_safetensors_shapes(checkpoints[0])
    layout = layout_from_shapes(shapes, folder, str(checkpoints[0]))
    for path in checkpoints[1:]:
        other_shapes = read_safetensors_shapes(path)
        if other_shapes != shapes:
            try:
                other = layout_from_shapes(other_shapes, folder, str(path))
            except LayoutError as error:
                raise LayoutError(f"{str(path)!r}: {error} Collect the task again.") from error
            raise LayoutError(
                f"{str(checkpoints[0])!r} and {str(path)!r}, of one task, have different layouts: "
                f"{layout.difference(other)}. Collect the task again."
            )
    return layout


def _check_format_version(data: Any, path: Path) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CorruptFileError(
            f"{str(path)!r} has no format_version, so it was not written by peft_dnd, or was edited by hand. Collect "
            "the task again."
        )
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{str(path)!r} is of pairs format {version}, written by peft_dnd {data.get('peft_dnd_version', '?')}; "
            f"this is peft_dnd {__version__}, which reads formats up to {FORMAT_VERSION}. Upgrade: "
            "pip install --upgrade peft-dnd."
        )


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {getattr(kind, '__name__', kind)}, found {value!r:.100}")
    return value


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise TypeError(f"expected a training step, found {value!r:.100}")
    return value
