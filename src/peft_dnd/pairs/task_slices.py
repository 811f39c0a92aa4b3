# SPDX-License-Identifier: Apache-2.0
"""Sharing out the collection of many tasks among jobs that know nothing of one another.

Each job of an array takes its slice of the task list, and of that what is not collected yet. Slices have no task in
common, so that no two jobs write the same folder; what they share, the pairs folder's common initialisation, is made
by whichever comes first. A job that was killed is simply run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from ..adapters.names import natural_key
from ..errors import GeneratorConfigError
from ..storage.files import PathLike
from .folder import TASK_NAME, read_task


def tasks_of_slice(tasks: Iterable[str], part: str) -> list[str]:
    """The tasks that one of several jobs is to collect.

    Args:
        tasks: All tasks' names. Every job must be given the same ones, in whatever order.
        part: `"k/n"`: the k-th of n jobs, from `"1/n"` to `"n/n"`.

    Returns:
        Every n-th of the names in natural order, from the k-th on. Slices differ in length by one at most, have
        nothing in common, and together are all tasks.

    Raises:
        GeneratorConfigError: If `part` is not of that form, or a name comes twice.

    >>> tasks_of_slice(["task 10", "task 2", "task 1"], "1/2")
    ['task 1', 'task 10']
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise GeneratorConfigError(f"A slice is k/n with k from 1 to n, such as 1/16 or 16/16; got {part!r}.")
    number, count = int(match[1]), int(match[2])
    ordered = sorted(tasks, key=natural_key)
    twice = [name for name, following in pairwise(ordered) if name == following]
    if twice:
        raise GeneratorConfigError(f"Task {twice[0]!r} is in the list twice, so two jobs might write its folder.")
    return ordered[number - 1 :: count]


def uncollected(tasks: Iterable[str], pairs: PathLike) -> list[str]:
    """Those of some tasks whose folders in a pairs folder are not complete, in the order given.

    Args:
        tasks: The tasks' names, which are those of their folders.
        pairs: The pairs folder, which need not exist yet.

    Raises:
        CorruptFileError: If a `task.json` is unreadable.
    """
    return [name for name in tasks if not is_complete(Path(pairs) / name)]


def is_complete(task_folder: PathLike) -> bool:
    """Whether a task's collection came to its end; false where it never began.

    Raises:
        CorruptFileError: If its `task.json` is unreadable.
    """
    return (Path(task_folder) / TASK_NAME).is_file() and read_task(task_folder).complete
