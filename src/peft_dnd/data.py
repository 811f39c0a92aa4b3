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
"""Prompt-checkpoint pairs as a data set: reading them, drawing batches of them, and their statistics."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import snapshot_download
from torch.utils.data import Dataset
from transformers.utils import logging as transformers_logging

from .errors import PairsFolderError
from .files import PathLike, read_safetensors
from .layout import AdapterLayout, natural_key
from .lora import ADAPTER_CONFIG_NAME
from .losses import SpreadAccumulator, TokenSpread
from .pairs import CHECKPOINTS_FOLDER, PROMPTS_NAME, TASK_NAME, Task, check_alike, find_tasks, load_task
from .prompts import TokenStates, select_prompts
from .tokenizer import WeightNormalization, WeightTokenizer


_KEPT_IN_MEMORY = 2**30
_WORTH_A_BAR = 8


class PromptCheckpointDataset(Dataset[dict[str, Any]]):
    """Pairs of a task's pool of prompts and one of its checkpoints, for fitting a generator.

    Its length is the number of checkpoints of all tasks, which stand in natural order of their names, checkpoints in
    that of their steps. Everything is checked when it is made, from the files' headers; weights are read when they are
    asked for. An item is a dictionary of

    - `"task"`: the task's name;
    - `"prompts"`: its whole pool of prompts, a tuple;
    - `"state_dict"`: the checkpoint, PEFT's on-disk key -> float32 tensor;
    - `"seed"`: the seed for drawing prompts from the pool. It follows from the data set's seed, the epoch and the
      index alone: each visit draws afresh, and a resumed run, or one with more worker processes, draws the same.

    An index is a number, for the epoch that [`set_epoch`][PromptCheckpointDataset.set_epoch] set, or a pair
    `(epoch, number)`, which a sampler may give.

    Make one with [`from_folder`][PromptCheckpointDataset.from_folder] or
    [`from_hub`][PromptCheckpointDataset.from_hub].
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0, keep_in_memory: bool = False) -> None:
        self.seed = seed
        self.keep_in_memory = keep_in_memory
        self._tasks = {task.name: task for task in tasks}
        self._items = [(task, path) for task in tasks for path in task.checkpoints]
        self._kept: dict[Path, dict[str, torch.Tensor]] = {}
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
    ) -> PromptCheckpointDataset:
        """Read a pairs folder, as [`CheckpointCollector`] writes it.

        Args:
            path: The pairs folder.
            tasks: The names of the tasks to read; all by default. Others are not looked into.
            seed: Seed of all drawing of prompts.
            keep_in_memory: Whether to read each checkpoint from disk but once; by default if they are less than 1 GiB.

        Raises:
            PairsFolderError: If there is no such folder, no task in it, none of a name asked for, or a task is
                incomplete or has no prompts.
            PromptError: If a prompt is empty.
            CorruptFileError: If a file is unreadable, for instance cut short.
            LayoutError: If adapters differ in their layouts; the first difference is named.
            FormatVersionError: If a newer version of the library wrote it.
        """
        folders = find_tasks(path, None if tasks is None else _names(tasks)).values()
        read = [load_task(folder) for folder in _with_progress(folders, "Checking pairs")]
        check_alike(read)
        if keep_in_memory is None:
            sizes = (checkpoint.stat().st_size for task in read for checkpoint in task.checkpoints)
            keep_in_memory = sum(sizes) < _KEPT_IN_MEMORY
        return cls(read, seed=seed, keep_in_memory=keep_in_memory)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        tasks: Iterable[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        seed: int = 0,
        keep_in_memory: bool | None = None,
    ) -> PromptCheckpointDataset:
        """Download a pairs folder that was uploaded as a data set to the Hub, and read it.

        Args:
            repo_id: The data set's id, `"name/data-set"`.
            tasks: The names of the tasks to read; all by default. Of others only `task.json` is downloaded.
            revision: Branch, tag or commit.
            token: Access token.
            cache_dir: Where downloads are kept.
            local_files_only: Whether to do without the network.
            seed: As for `from_folder`.
            keep_in_memory: As for `from_folder`.

        Raises:
            HfHubHTTPError: The Hub's own, if there is no such data set or revision, or you have no access.
            HFValidationError: The Hub's own, if `repo_id` is none.
            PairsFolderError: And the others of `from_folder`, for what was downloaded.
        """

        def download(patterns: list[str]) -> str:
            return snapshot_download(
                repo_id,
                repo_type="dataset",
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )

        names = None if tasks is None else _names(tasks)
        folders = ["*"]
        if names is not None:
            found = find_tasks(download([f"*/{TASK_NAME}"]), names)
            folders = [glob.escape(folder.name) for folder in found.values()]
        files = (TASK_NAME, PROMPTS_NAME, ADAPTER_CONFIG_NAME, f"{CHECKPOINTS_FOLDER}/*.safetensors")
        path = download([f"{folder}/{file}" for folder in folders for file in files])
        return cls.from_folder(path, names, seed=seed, keep_in_memory=keep_in_memory)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in natural order."""
        return tuple(self._tasks)

    @property
    def layout(self) -> AdapterLayout:
        """The layout that all checkpoints share."""
        return next(iter(self._tasks.values())).layout

    def prompts(self, task: str) -> tuple[str, ...]:
        """A task's whole pool of prompts."""
        return self._task(task).prompts

    def checkpoints(self, task: str) -> tuple[Path, ...]:
        """The files of a task's checkpoints, in the order of their steps."""
        return self._task(task).checkpoints

    def state_dict(self, task: str, checkpoint: int = -1) -> dict[str, torch.Tensor]:
        """One of a task's checkpoints, by its place among them; the last one by default.

        Raises:
            WeightValueError: If it holds NaN or infinity.
        """
        found = self._task(task)
        return self._read(found, found.checkpoints[checkpoint])

    def mean_state_dict(self, task: str | None = None) -> dict[str, torch.Tensor]:
        """The mean of a task's checkpoints; without a task the mean of all tasks' means, float32.

        Raises:
            WeightValueError: If a checkpoint holds NaN or infinity.
        """
        if task is None:
            return _mean(self.mean_state_dict(name) for name in self.tasks)
        found = self._task(task)
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
        parts = [PromptCheckpointDataset(p, seed=self.seed, keep_in_memory=self.keep_in_memory) for p in (rest, out)]
        return parts[0], parts[1]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the items' seeds depend."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, number = index if isinstance(index, tuple) else (int(self._epoch), index)
        number = range(len(self._items))[number]
        task, path = self._items[number]
        return {
            "task": task.name,
            "prompts": task.prompts,
            "state_dict": self._read(task, path),
            "seed": _stable_seed(self.seed, epoch, number),
        }

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            raise PairsFolderError(f"There is no task {name!r}. The tasks: {', '.join(map(repr, self._tasks))}.")
        return self._tasks[name]

    def _read(self, task: Task, path: Path) -> dict[str, torch.Tensor]:
        kept = self._kept.get(path)
        if kept is None:
            kept = {key: tensor.float() for key, tensor in read_safetensors(path).items()}
            task.layout.check_state_dict(kept, source=f"{str(path)!r}")
            if self.keep_in_memory:
                self._kept[path] = kept
        return dict(kept)


class PromptReader(Protocol):
    """What the collator needs of a [`PromptEmbeddingCache`]."""

    def states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        """The states of all prompts of a task."""
        ...


@dataclass
class PromptCheckpointCollator:
    """Makes batches of a [`PromptCheckpointDataset`]'s items.

    N prompts are drawn from each item's pool by [`select_prompts`], the rule by which a generator chooses among too
    many, or too few, when it is used.

    A batch of B items is a dictionary of

    - `"condition_states"`: (B, N, L, C), float32, and `"condition_mask"`: (B, N, L), bool, true where there is a
      token; or, without `encode`, `"prompts"`: B lists of N strings;
    - `"target_tokens"`: (B, N_w, L_w, C_w), float32, the checkpoints as token grids, as they are: not normalised.

    Args:
        embeddings: Gives the states of a task's prompts.
        weight_tokenizer: Makes the grids.
        num_prompts: N.
        max_length: L.
        encode: Whether to give states. A text encoder that is being fitted too has to read the prompts anew each time.
    """

    embeddings: PromptReader
    weight_tokenizer: WeightTokenizer
    num_prompts: int
    max_length: int
    encode: bool = True
    # A cache tells pools apart by their whole text, which takes time; the same object comes again with every batch.
    _known: dict[int, tuple[Sequence[str], TokenStates]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items."""
        batch: dict[str, Any] = {
            "target_tokens": torch.stack([self.weight_tokenizer.encode(item["state_dict"]) for item in items])
        }
        chosen = [select_prompts(len(item["prompts"]), self.num_prompts, item["seed"]) for item in items]
        if not self.encode:
            batch["prompts"] = [[i["prompts"][k] for k in c.tolist()] for i, c in zip(items, chosen, strict=True)]
            return batch
        states = [self._states(item["task"], item["prompts"]) for item in items]
        selected = [s.select(indices, self.max_length) for s, indices in zip(states, chosen, strict=True)]
        batch["condition_states"] = torch.stack([states for states, _ in selected])
        batch["condition_mask"] = torch.stack([mask for _, mask in selected])
        return batch

    def warm_up(self, dataset: PromptCheckpointDataset) -> None:
        """Have the prompts of all tasks read, so that no batch has to wait for it, nor each worker process do it."""
        for task in _with_progress(dataset.tasks, "Reading prompts"):
            self._states(task, dataset.prompts(task))

    def _states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        if id(prompts) not in self._known:
            self._known[id(prompts)] = (prompts, self.embeddings.states(task, prompts))
        return self._known[id(prompts)][1]


def task_balanced_grids(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer
) -> Iterator[tuple[torch.Tensor, float]]:
    """All checkpoints as token grids, each with its weight for `weight_statistics`.

    Each task weighs the same, however many checkpoints it has: weights add up to 1 for each.

    Args:
        dataset: The pairs.
        tokenizer: Makes the grids.

    Yields:
        A float32 grid of the tokenizer's `grid_shape`, and its weight.
    """
    for task, grid in _grids(dataset, tokenizer, "Mean and scale of the weights"):
        yield grid, 1.0 / len(dataset.checkpoints(task))


def token_spread(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer, normalization: WeightNormalization
) -> TokenSpread:
    """How far each weight token's entries lie apart, within tasks and between them, after normalisation.

    This takes a pass of its own: how far they do, relative to other tokens, depends on the scales, which are known
    only after the pass that [`task_balanced_grids`] serves.

    Args:
        dataset: The pairs.
        tokenizer: Makes the grids.
        normalization: Its statistics are set already; or not, for the spread of the weights as they are.
    """
    spread = SpreadAccumulator(tokenizer.valid_mask())
    mean, scale = normalization.mean.cpu(), normalization.scale.cpu()[:, None, None]
    for task, grid in _grids(dataset, tokenizer, "Spread of the weights"):
        spread.update(task, (grid - mean) / scale)
    return spread.result()


def _grids(
    dataset: PromptCheckpointDataset, tokenizer: WeightTokenizer, what: str
) -> Iterator[tuple[str, torch.Tensor]]:
    numbered = [(task, number) for task in dataset.tasks for number in range(len(dataset.checkpoints(task)))]
    for task, number in _with_progress(numbered, what):
        yield task, tokenizer.encode(dataset.state_dict(task, number))


def _stable_seed(*parts: int) -> int:
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
    return {names} if isinstance(names, str) else set(names)


_Item = TypeVar("_Item")


def _with_progress(items: Collection[_Item], what: str) -> Iterable[_Item]:
    progress: Iterable[_Item] = transformers_logging.tqdm(items, desc=what, disable=len(items) < _WORTH_A_BAR)
    return progress
