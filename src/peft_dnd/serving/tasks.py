# SPDX-License-Identifier: Apache-2.0
"""Names of tasks: each leads to its adapter, and where the operator wants it, to its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, GeneratorConfigError
from ..storage.files import read_json, write_json
from .locks import alone
from .problems import Problem


TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


@dataclass(frozen=True)
class TaskPrompts:
    """What an adapter is made from.

    Attributes:
        prompts: The task's prompts.
        answers: Their answers, for a generator that reads them.
        generator: Name of the generator; `None` is the first.
        seed: The seed.
        out_of_distribution: What to do about prompts that do not belong: `ignore`, `shrink`, `mean` or `refuse`.
        threshold: Above which score they do not; `None` is what the fitted tasks give.
        base: Which base the adapter is for, where the generator has several.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...] | None = None
    generator: str | None = None
    seed: int = 0
    out_of_distribution: str = "ignore"
    threshold: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class Task:
    """A name, and what it stands for.

    Attributes:
        name: The name.
        adapter: Id of its adapter; `None` if none was made yet.
        source: What the adapter is made from; `None` if that is not remembered.
        fixed: Whether the operator gave it, so that clients cannot change it.
    """

    name: str
    adapter: str | None
    source: TaskPrompts | None
    fixed: bool = False


class TaskNames:
    """The tasks that have a name, in the cache folder, where all processes that share it see them.

    Args:
        folder: Where they lie.
        most: How many there may be.
        remember_prompts: Whether prompts are written there too.
        fixed: Tasks that the operator gives, name -> what their adapter is made from. Nothing of them is written.

    Raises:
        GeneratorConfigError: If one of these has a name that no task may have.
    """

    def __init__(
        self,
        folder: Path,
        most: int,
        *,
        remember_prompts: bool = False,
        fixed: Mapping[str, TaskPrompts] | None = None,
    ) -> None:
        self._folder, self._most, self.remember_prompts = folder, most, remember_prompts
        self._fixed = {name: Task(name, None, source, fixed=True) for name, source in (fixed or {}).items()}
        for name in self._fixed:
            if not re.fullmatch(TASK_NAME, name):
                raise GeneratorConfigError(
                    f"A task cannot be called {name!r}: expected letters, digits and ._- alone, at most 128 of them, "
                    "and a letter or digit first. Rename its file."
                )

    def get(self, name: str) -> Task | None:
        """The task of a name."""
        return self._fixed.get(name) or _read(self._file(name))

    def all(self) -> list[Task]:
        """All tasks, by name."""
        written = [task for task in map(_read, self._folder.glob("*.json")) if task is not None]
        return sorted({**{task.name: task for task in written}, **self._fixed}.values(), key=lambda task: task.name)

    def put(self, name: str, adapter: str, source: TaskPrompts) -> Task:
        """Give a name to an adapter.

        Raises:
            Problem: If the name is the operator's, or there are too many.
        """
        self.check_free(name)
        task = Task(name, adapter, source if self.remember_prompts else None)
        with alone(self._folder / "lock"):
            if not self._file(name).exists() and len(list(self._folder.glob("*.json"))) >= self._most:
                raise Problem(409, f"There are {self._most} tasks already, the most that there may be. Delete one.")
            write_json(self._file(name), asdict(task))
        return task

    def remove(self, name: str) -> bool:
        """Forget a task; returns whether there was one.

        Raises:
            Problem: If it is the operator's.
        """
        self.check_free(name)
        try:
            self._file(name).unlink()
        except OSError:
            return False
        return True

    def check_free(self, name: str) -> None:
        """Make sure that a name is not the operator's.

        Raises:
            Problem: Otherwise.
        """
        if name in self._fixed:
            raise Problem(409, f"The task {name!r} is the operator's, and cannot be changed. Take another name.")

    def _file(self, name: str) -> Path:
        # Never the name itself: whoever asks does not say what a file is called.
        return self._folder / f"{sha256(name.encode()).hexdigest()}.json"


def _read(path: Path) -> Task | None:
    try:
        found: dict[str, Any] = read_json(path)
        source = found["source"]
        if source is not None:
            answers = source["answers"]
            source = TaskPrompts(
                **{
                    **source,
                    "prompts": tuple(source["prompts"]),
                    "answers": None if answers is None else tuple(answers),
                }
            )
        return Task(found["name"], found["adapter"], source)
    except (OSError, CorruptFileError, KeyError, TypeError):
        return None
