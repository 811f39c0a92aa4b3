# SPDX-License-Identifier: Apache-2.0
"""A task's examples on disk: rows of what the base's forward takes, for a fit on the task's own loss.

They lie in the task's folder as `examples.jsonl`, one JSON object a line, such as `{"input_ids": [...], "labels":
[...]}`. A file is never read whole: where its lines begin is noted once, and the rows that are drawn are read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptFileError, PairsFolderError
from ..storage.files import PathLike, staged_file
from ..text.drawing import draw


EXAMPLES_NAME = "examples.jsonl"

_BLOCK = 2**22


class TaskExamples:
    """A task's examples on disk. Its length is their number, its items are rows; it may be sent to worker processes.

    Args:
        path: The file.

    Raises:
        PairsFolderError: If there is no such file, or no row in it.
        CorruptFileError: If its first or last row is none.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise PairsFolderError(
                f"There is no file {str(self.path)!r}. Write a task's examples with peft_dnd.write_examples, or with "
                "CheckpointCollector(..., examples=...)."
            )
        self._starts = _starts_of_lines(self.path)
        if len(self) == 0:
            raise PairsFolderError(f"{str(self.path)!r} holds no example. Write at least one, or remove the file.")
        for number in (0, len(self) - 1):
            self[number]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row by its number."""
        return self.read([range(len(self))[number]])[0]

    def read(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Rows by their numbers, each from 0 to the length, in the order given.

        Raises:
            CorruptFileError: If one of them is no JSON object.
        """
        with self.path.open("rb") as file:
            return [self._row(file, number) for number in numbers]

    def draw(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Draw rows without replacement; all of them, in their order, where there are no more than `count`.

        Args:
            count: How many.
            seed: The same seed gives the same rows, on every platform.
        """
        size = len(self)
        if count >= size:
            return self.read(range(size))
        return self.read(draw(size, count, random.Random(f"examples {seed}")))

    def _row(self, file: Any, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        file.seek(start)
        try:
            row = json.loads(file.read(end - start))
            if not isinstance(row, dict) or not row:
                raise ValueError(f"found {type(row).__name__} {str(row)[:40]!r}")
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"Row {number} of {str(self.path)!r} (from byte {start}) is no JSON object of what the base's forward "
                f"takes ({error}). The file may have been cut short or edited by hand: write it again."
            ) from error
        return row


class KeptExamples(TaskExamples):
    """Rows that are held in memory, and lie in no file of their own.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = tuple(dict(row) for row in rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Rows by their numbers."""
        return [dict(self._rows[number]) for number in numbers]


def write_examples(task_folder: PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a task's examples into its folder, in place of any that are there, whole or not at all.

    Args:
        task_folder: The task's folder inside the pairs folder, such as `"pairs/law"`.
        rows: What the base's forward takes for one example each, without a batch axis: name -> list of numbers, a
            number, or whatever else the `task_collator` can read. Tensors and arrays become lists. Rows are taken
            one by one, so that a generator or a streamed data set will do.

    Returns:
        How many there were.

    Raises:
        PairsFolderError: If there are none, or one is empty, no mapping, or holds what JSON cannot.
    """
    path = Path(task_folder) / EXAMPLES_NAME
    count = 0
    with staged_file(path) as staged, staged.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line_of(row, count))
            count += 1
        if count == 0:
            raise PairsFolderError(f"There are no examples to write to {str(path)!r}. Give at least one row.")
    return count


def _line_of(row: Any, number: int) -> str:
    if not isinstance(row, Mapping) or not row:
        raise PairsFolderError(
            f"Example {number} must be a mapping of what the base's forward takes, such as "
            f"{{'input_ids': [...], 'labels': [...]}}, not {type(row).__name__} {str(row)[:40]!r}."
        )
    try:
        return json.dumps(dict(row), ensure_ascii=False, separators=(",", ":"), default=_as_list) + "\n"
    except (TypeError, ValueError) as error:
        raise PairsFolderError(
            f"Example {number} cannot be written as JSON ({error}). Give lists, numbers, strings, tensors or arrays."
        ) from error


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither a list nor a number, string, tensor or array")


def _starts_of_lines(path: Path) -> np.ndarray:
    """Where each line begins, and after the last of them the end: int64, one more than there are lines."""
    ends, position = [], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            position += len(block)
    starts = np.concatenate([np.zeros(1, np.int64), *ends])
    return starts if starts[-1] == position else np.append(starts, position)
