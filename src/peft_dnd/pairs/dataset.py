# SPDX-License-Identifier: Apache-2.0
"""The data set: a pairs folder's prompts and checkpoints, item by item, as a `Trainer` goes through them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from typing_extensions import Unpack

from ..adapters.factors import canonical_state_dict
from ..adapters.layout import AdapterLayout
from ..adapters.lora import ADAPTER_CONFIG_NAME
from ..adapters.names import natural_key
from ..errors import GeneratorConfigError, LayoutError, PairsFolderError
from ..storage.files import PathLike, read_safetensors
from ..storage.hub import PAIRS, HubOptions, find_folder, takes_keywords_of
from ..storage.progress import with_progress
from ..text.prompts import select_prompts
from ..text.prompts_and_answers import condition_texts
from .distillation import RECORD_NAME, ROWS_NAME
from .examples import EXAMPLES_NAME, TaskExamples
from .folder import CHECKPOINTS_FOLDER, TASK_NAME, Task, check_alike, find_tasks, load_task
from .prompt_pool import PROMPTS_NAME


_KEPT_IN_MEMORY = 2**30


class ReplayedCheckpoint(Protocol):
    """A checkpoint that lies in no file of its own."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """PEFT's on-disk key -> float32 tensor."""


class PromptCheckpointDataset(Dataset[dict[str, Any]]):
    """Pairs of a task's pool of prompts and one of its checkpoints, for fitting a generator.

    Its length is the number of checkpoints of all tasks, which stand in natural order of their names, checkpoints in
    that of their steps; a task without any counts as the one with the most, or once if no task has any. Everything is
    checked when it is made, from the files' headers; weights are read when they are asked for. An item is a dictionary
    of

    - `"task"`: the task's name;
    - `"prompts"`: its whole pool of prompts, a tuple; see [`with_condition`][PromptCheckpointDataset.with_condition]
      for others;
    - `"state_dict"`: the checkpoint, PEFT's on-disk key -> float32 tensor; `None` for a task without any;
    - `"examples"`: the task's [`TaskExamples`], from which rows can be drawn, or `None`;
    - `"distillation"`: the same of what a teacher said to inputs of the task, or `None`;
    - `"replayed"`: whether it is an earlier task of a generator that goes on, which is held against weights;
    - `"seed"`: the seed for drawing prompts from the pool. It follows from the data set's seed, the epoch and the
      index alone: each visit draws afresh, and a resumed run, or one with more worker processes, draws the same.

    An index is a number, for the epoch that [`set_epoch`][PromptCheckpointDataset.set_epoch] set, or a pair
    `(epoch, number)`, which a sampler may give.

    Make one with [`from_folder`][PromptCheckpointDataset.from_folder] or
    [`from_hub`][PromptCheckpointDataset.from_hub].

    Attributes:
        hub_id: The data set on the Hub that it was read from, if it was.
        hub_commit: And its commit.
    """

    hub_id: str | None = None
    hub_commit: str | None = None

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int = 0,
        keep_in_memory: bool = False,
        layout: AdapterLayout | None = None,
        canonical: bool = False,
    ) -> None:
        self.seed = seed
        self.canonical = canonical
        self.keep_in_memory = keep_in_memory
        self._tasks = {task.name: task for task in tasks}
        self._layout = next((task.layout for task in tasks if task.layout is not None), layout)
        visits = max([1, *(len(task.checkpoints) for task in tasks)])
        self._items = [(task, path) for task in tasks for path in (task.checkpoints or (None,) * visits)]
        self._kept: dict[Path, dict[str, torch.Tensor]] = {}
        self._replayed: Mapping[Path, ReplayedCheckpoint] = {}
        self._against_weights: frozenset[str] = frozenset()
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_folder(
        cls,
        path: PathLike,
        tasks: Iterable[str] | None = None,
        *,
        seed: int = 0,
        keep_in_memory: bool | None = None,
        layout: AdapterLayout | None = None,
    ) -> PromptCheckpointDataset:
        """Read a pairs folder, as [`CheckpointCollector`] writes it.

        Args:
            path: The pairs folder.
            tasks: The names of the tasks to read; all by default. Others are not looked into.
            seed: Seed of all drawing of prompts.
            keep_in_memory: Whether to read each checkpoint from disk but once; by default if they are less than 1 GiB.
            layout: The layout of the adapters to be written, where no task has checkpoints to read it from.

        Raises:
            PairsFolderError: If there is no such folder, no task in it, none of a name asked for, or a task is
                incomplete or has no prompts.
            PromptError: If a prompt is empty.
            CorruptFileError: If a file is unreadable, for instance cut short.
            LayoutError: If adapters differ in their layouts, or from the given one; the first difference is named.
            FormatVersionError: If a newer version of the library wrote it.
        """
        if layout is not None and not isinstance(layout, AdapterLayout):
            raise LayoutError(f"layout must be an AdapterLayout, got {layout!r}. AdapterLayout.from_folder reads one.")
        folders = find_tasks(path, None if tasks is None else _names(tasks)).values()
        read = [load_task(folder) for folder in with_progress(folders, "Checking pairs")]
        check_alike(read)
        if keep_in_memory is None:
            sizes = (checkpoint.stat().st_size for task in read for checkpoint in task.checkpoints)
            keep_in_memory = sum(sizes) < _KEPT_IN_MEMORY
        pairs = cls(read, seed=seed, keep_in_memory=keep_in_memory, layout=layout)
        if layout is not None and (difference := pairs.layout.difference(layout)) is not None:
            raise LayoutError(
                f"The checkpoints in {str(path)!r} have another layout than layout= says: {difference} (the first is "
                "the checkpoints'). Leave layout= out, or choose among the tasks with tasks=[...]."
            )
        return pairs

    @classmethod
    @takes_keywords_of(find_folder)
    def from_hub(
        cls,
        repo_id: str,
        tasks: Iterable[str] | None = None,
        *,
        seed: int = 0,
        keep_in_memory: bool | None = None,
        layout: AdapterLayout | None = None,
        **hub: Unpack[HubOptions],
    ) -> PromptCheckpointDataset:
        """Download a pairs folder that was uploaded as a data set to the Hub, and read it.

        A generator that is fitted to it names it in its card.

        Args:
            repo_id: The data set's id, `"name/data-set"`.
            tasks: The names of the tasks to read; all by default. Of others only `task.json` is downloaded.
            seed: As for `from_folder`.
            keep_in_memory: As for `from_folder`.
            layout: As for `from_folder`.
            hub: See [`HubOptions`][peft_dnd.storage.hub.HubOptions].

        Raises:
            PairsFolderError: If there is no such data set or revision, or you have no access.
            PromptError: And the others of `from_folder`, for what was downloaded.
        """
        names = None if tasks is None else _names(tasks)
        folders = ["*"]
        if names is not None:
            path, commit = find_folder(PAIRS, repo_id, [f"*/{TASK_NAME}"], **hub)
            folders = [glob.escape(folder.name) for folder in find_tasks(path, names).values()]
            if commit is not None:
                hub["revision"] = commit  # all of it is of one commit
        files = [TASK_NAME, PROMPTS_NAME, EXAMPLES_NAME, RECORD_NAME, ROWS_NAME, ADAPTER_CONFIG_NAME]
        files.append(f"{CHECKPOINTS_FOLDER}/*.safetensors")
        path, commit = find_folder(PAIRS, repo_id, [f"{folder}/{file}" for folder in folders for file in files], **hub)
        pairs = cls.from_folder(path, names, seed=seed, keep_in_memory=keep_in_memory, layout=layout)
        if commit is not None:
            pairs.hub_id, pairs.hub_commit = repo_id, commit
        return pairs

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in natural order."""
        return tuple(self._tasks)

    @property
    def layout(self) -> AdapterLayout:
        """The layout that all checkpoints share, or the one given where there are none.

        Raises:
            PairsFolderError: If there are no checkpoints and no layout was given.
        """
        if self._layout is None:
            raise PairsFolderError(
                "No task has checkpoints, so there is no adapter layout to be read. Pass from_folder(..., "
                "layout=AdapterLayout.from_lora_config(lora_config, base_model))."
            )
        return self._layout

    @property
    def has_checkpoints(self) -> bool:
        """Whether any task has checkpoints."""
        return self.num_checkpoints > 0

    @property
    def num_checkpoints(self) -> int:
        """How many checkpoints all tasks have together."""
        return sum(len(task.checkpoints) for task in self._tasks.values())

    def with_canonical_factors(self) -> PromptCheckpointDataset:
        """The same pairs, but each checkpoint with its factors in canonical form; see [`canonical_state_dict`]."""
        return self if self.canonical else self._of(self._tasks.values(), canonical=True)

    def with_condition(
        self, condition_text: str = "prompts", answer_ratio: float = 0.2, *, prompt_pool_size: int | None = None
    ) -> PromptCheckpointDataset:
        """The same pairs, but with other texts in place of the prompts, or fewer of them.

        `DnDTrainer` does this as the generator's configuration and its own arguments say. What is drawn depends on the
        data set's seed and the task's name, so that it is the same in every epoch and run.

        Args:
            condition_text: Which texts; see [`condition_texts`][peft_dnd.text.prompts_and_answers.condition_texts].
            answer_ratio: For `"mixed"`: which share of a task's texts holds answers.
            prompt_pool_size: How many prompts of each task to keep, drawn once; by default all. With as many as the
                decoder reads, it reads the same ones at every step.

        Raises:
            GeneratorConfigError: If a value is impossible.
            PromptError: If a task has no answers, and they are needed.
            PairsFolderError: If the texts are in another form than the prompts already.
        """
        if prompt_pool_size is not None and (not isinstance(prompt_pool_size, int) or prompt_pool_size < 1):
            raise GeneratorConfigError(f"prompt_pool_size must be at least 1, got {prompt_pool_size!r}.")
        formed = []
        for task in self._tasks.values():
            seed = _stable_seed(self.seed, task.name)  # the task's own, whatever other tasks there are
            smaller = task if prompt_pool_size is None else _with_fewer_prompts(task, prompt_pool_size, seed)
            formed.append(_with_texts(smaller, condition_text, answer_ratio, seed))
        if all(new is old for new, old in zip(formed, self._tasks.values(), strict=True)):
            return self
        return self._of(formed)

    def with_replayed(
        self,
        tasks: Iterable[Task],
        checkpoints: Mapping[str, ReplayedCheckpoint],
        against_weights: Iterable[str] = (),
    ) -> PromptCheckpointDataset:
        """The same pairs and those of earlier tasks, of which a generator has kept something.

        Args:
            tasks: The earlier tasks, none of those that are here.
            checkpoints: Task name -> its checkpoint, which lies in no file, for those of them that have one.
            against_weights: Those that are held against weights whatever the others are held against: their items
                have a true `"replayed"`.
        """
        held, all_tasks = dict(self._replayed), list(self._tasks.values())
        for task in tasks:
            if task.name in checkpoints:
                place = Path("replayed", hashlib.sha256(task.name.encode("utf-8", "surrogatepass")).hexdigest())
                held[place] = checkpoints[task.name]
                task = replace(task, checkpoints=(place,), layout=self._layout)
            all_tasks.append(task)
        other = self._of(sorted(all_tasks, key=lambda task: natural_key(task.name)))
        other._replayed, other._against_weights = held, self._against_weights.union(against_weights)
        return other

    def prompts(self, task: str) -> tuple[str, ...]:
        """A task's whole pool of prompts, or of the texts in their place."""
        return self._task(task).prompts

    def answers(self, task: str) -> tuple[str, ...] | None:
        """The answers to a task's prompts, one each, if it has any."""
        return self._task(task).answers

    def examples(self, task: str) -> TaskExamples | None:
        """A task's examples, if it has any."""
        return self._task(task).examples

    def distillation(self, task: str) -> TaskExamples | None:
        """What a teacher said to inputs of a task, if any did; see [`distil_task`][peft_dnd.fitting.distil_task]."""
        return self._task(task).distillation

    def checkpoints(self, task: str) -> tuple[Path, ...]:
        """The files of a task's checkpoints, in the order of their steps."""
        return self._task(task).checkpoints

    def state_dict(self, task: str, checkpoint: int = -1) -> dict[str, torch.Tensor]:
        """One of a task's checkpoints, by its place among them; the last one by default.

        Raises:
            WeightValueError: If it holds NaN or infinity.
        """
        found = self._task_with_checkpoints(task)
        return self._read(found, found.checkpoints[checkpoint])

    def mean_state_dict(self, task: str | None = None) -> dict[str, torch.Tensor]:
        """The mean of a task's checkpoints; without a task the mean of all tasks' means, float32.

        Raises:
            WeightValueError: If a checkpoint holds NaN or infinity.
        """
        if task is None:
            return _mean(self.mean_state_dict(name) for name in self.tasks if self.checkpoints(name))
        found = self._task_with_checkpoints(task)
        return _mean(self._read(found, path) for path in found.checkpoints)

    def split(self, held_out: Iterable[str]) -> tuple[PromptCheckpointDataset, PromptCheckpointDataset]:
        """Split by tasks.

        Args:
            held_out: The names of the tasks to hold out.

        Returns:
            The pairs of all other tasks, and those of the held-out ones.

        Raises:
            PairsFolderError: If there is no task of such a name, or one of the two parts would be empty.
        """
        names = _names(held_out)
        out = [self._task(name) for name in sorted(names, key=natural_key)]
        rest = [task for task in self._tasks.values() if task.name not in names]
        if not out or not rest:
            raise PairsFolderError(
                f"Holding out {len(out)} of {len(self._tasks)} tasks leaves one of the two parts empty. Name at least "
                "one task, and not all."
            )
        return self._of(rest), self._of(out)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the items' seeds depend."""
        self._epoch.fill_(epoch)

    @property
    def item_tasks(self) -> tuple[str, ...]:
        """The task of each item."""
        return tuple(task.name for task, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, number = index if isinstance(index, tuple) else (int(self._epoch), index)
        number = range(len(self._items))[number]
        task, path = self._items[number]
        return {
            "task": task.name,
            "prompts": task.prompts,
            "state_dict": None if path is None else self._read(task, path),
            "examples": task.examples,
            "distillation": task.distillation,
            "replayed": task.name in self._against_weights,
            "seed": _stable_seed(self.seed, epoch, number),
        }

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise PairsFolderError(f"There is no task {name!r}. The tasks: {', '.join(map(repr, self._tasks))}.")
        return self._tasks[name]

    def _of(self, tasks: Iterable[Task], *, canonical: bool = False) -> PromptCheckpointDataset:
        """Other tasks, or the same ones in another form, with all else as it is here."""
        other = PromptCheckpointDataset(
            list(tasks),
            seed=self.seed,
            keep_in_memory=self.keep_in_memory,
            layout=self._layout,
            canonical=canonical or self.canonical,
        )
        other.hub_id, other.hub_commit = self.hub_id, self.hub_commit
        other._replayed, other._against_weights = self._replayed, self._against_weights
        return other

    def _task_with_checkpoints(self, name: str) -> Task:
        task = self._task(name)
        if not task.checkpoints:
            raise PairsFolderError(f"Task {name!r} has no checkpoints.")
        return task

    def _read(self, task: Task, path: Path) -> dict[str, torch.Tensor]:
        if path in self._replayed:
            return self._replayed[path].state_dict()
        kept = self._kept.get(path)
        if kept is None:
            kept = {key: tensor.float() for key, tensor in read_safetensors(path).items()}
            self.layout.check_state_dict(kept, source=f"{str(path)!r}")
            if self.canonical:
                kept = canonical_state_dict(self.layout, kept)
            if self.keep_in_memory:
                self._kept[path] = kept
        return dict(kept)


def _with_fewer_prompts(task: Task, pool_size: int, seed: int) -> Task:
    if pool_size >= len(task.prompts):
        return task
    kept = sorted(select_prompts(len(task.prompts), pool_size, seed).tolist())
    answers = None if task.answers is None else tuple(task.answers[index] for index in kept)
    return replace(task, prompts=tuple(task.prompts[index] for index in kept), answers=answers)


def _with_texts(task: Task, condition_text: str, answer_ratio: float, seed: int) -> Task:
    if task.condition_text == condition_text:
        return task
    what = f"the prompts of task {task.name!r}"
    if task.condition_text != "prompts":
        raise PairsFolderError(
            f"In place of {what} stand texts of the form {task.condition_text!r} already, so they cannot become "
            f"{condition_text!r}. Call with_condition on the pairs as they were read."
        )
    texts = condition_texts(
        task.prompts, task.answers, condition_text, answer_ratio=answer_ratio, seed=seed, what=what
    )
    return replace(task, prompts=texts, condition_text=condition_text)


def _stable_seed(*parts: int | str) -> int:
    # Python's own hash differs between builds; this is one number for good.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mean(state_dicts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    count = 0
    for count, state_dict in enumerate(state_dicts, 1):
        for key, tensor in state_dict.items():
            total[key] = total[key] + tensor if count > 1 else tensor.double()
    return {key: (tensor / count).float() for key, tensor in total.items()}


def _names(names: Iterable[str]) -> set[str]:
    found = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    wrong = [name for name in found if not isinstance(name, str)]
    if wrong:
        raise PairsFolderError(f"Tasks are named by strings, got {wrong[0]!r}.")
    return set(found)
