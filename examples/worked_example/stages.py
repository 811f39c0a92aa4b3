# SPDX-License-Identifier: Apache-2.0
"""What the worked example has made so far, how long it took, and what must be made again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_dnd.storage.files import read_json, write_json


@dataclass(frozen=True)
class Stage:
    """One stage of the example.

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
        folder: The folder; seconds are kept in its `seconds.json`, so that a second run reports what the first took.
        stages: What is made there.

    Attributes:
        seconds: Name -> seconds spent so far.
    """

    def __init__(self, folder: Path, stages: Mapping[str, Stage] = STAGES) -> None:
        self.folder = folder
        self._stages = stages
        self._record = folder / "seconds.json"
        self.seconds: dict[str, float] = read_json(self._record) if self._record.is_file() else {}

    def begin(self, stage: str) -> None:
        """Call before anything of a stage is made: what followed from an earlier product of it is removed.

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

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage has taken."""
        name = self._stages[stage].seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        write_json(self._record, self.seconds)

    def _products(self, stage: str) -> list[Path]:
        return [self.folder / name for name in self._stages[stage].products]
