# SPDX-License-Identifier: Apache-2.0
"""What a run has made so far, how long it took, and what must be made again: of the example, and of benchmarks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dnd.storage.files import read_json, write_json


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        seconds: The name under which the report gives its time.
        products: The files and folders that it makes.
        follow: The stages that work with these, directly or not.
    """

    seconds: str
    products: tuple[str, ...]
    follow: tuple[str, ...] = ()


STAGES = {
    "base": Stage("pretraining the base", ("base",), ("pairs", "trained", "generator", "adapters", "scores")),
    "pairs": Stage("training adapters and collecting checkpoints", ("pairs",), ("generator", "adapters", "scores")),
    "trained": Stage("training on the held-out tasks", ("trained",), ("scores",)),
    "generator": Stage("fitting the generator", ("fitting", "generator"), ("adapters", "scores")),
    "adapters": Stage("generating adapters", ("adapters",), ("scores",)),
    "scores": Stage("comparing", ("scores.json",)),
}


class Progress:
    """The folder in which a run leaves what it has made, so that the next one starts from there.

    Args:
        folder: The folder; seconds are kept in a file there, so that a second run reports what the first took.
        stages: What is made there.
        record: The name of that file.
        clock: Tells the seconds.

    Attributes:
        folder: The folder.
        seconds: Name -> seconds spent so far.
    """

    def __init__(
        self,
        folder: Path,
        stages: Mapping[str, Stage] = STAGES,
        *,
        record: str = "seconds.json",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder = folder
        self._stages = stages
        self._record = folder / record
        self._clock = clock
        self.seconds: dict[str, float] = read_json(self._record) if self._record.is_file() else {}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Make sure that what an earlier run left was made with these settings; the first run writes them down."""
        path = self.folder / "settings.json"
        if not path.is_file():
            write_json(path, settings)
        elif read_json(path) != settings:
            raise SystemExit(
                f"{self.folder} was made with other settings than there are now. Remove it: rm -r {self.folder}"
            )

    @contextmanager
    def working_on(self, stage: str) -> Iterator[None]:
        """Within this context something of a stage is made; what followed from an earlier product of it is removed.

        What an interrupted run has made of the stage itself stays.
        """
        if not any(path.exists() for path in self._products(stage)):
            self.seconds.pop(self._stages[stage].seconds, None)
        for later in self._stages[stage].follow:
            self.seconds.pop(self._stages[later].seconds, None)
            for path in self._products(later):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
        began = self._clock()
        yield
        name = self._stages[stage].seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began
        write_json(self._record, self.seconds)

    def _products(self, stage: str) -> list[Path]:
        return [self.folder / name for name in self._stages[stage].products]
