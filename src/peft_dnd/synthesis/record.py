# SPDX-License-Identifier: Apache-2.0
"""What a synthesis has come to so far, in a file of JSON lines to which every round is appended.

The first line says what was asked for; each further one is a round: what was kept and what was left out, and why. A
pass that was killed goes on after the last whole line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, FormatVersionError, PairsFolderError
from ..storage.appended_lines import append_lines, take_off_half_line, whole_lines
from ..storage.files import PathLike
from ..version import __version__


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Synthesis:
    """What came of a synthesis.

    Attributes:
        prompts: The new prompts, in the order in which they were written; the seeds are not among them.
        answers: Their answers, one each; `None` if none were asked for.
        left_out: Why prompts were left out -> how many.
        rounds: How many rounds it took.
        complete: Whether there are as many as were asked for.
    """

    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    complete: bool = False


@dataclass(frozen=True)
class Round:
    """What one round gave.

    Attributes:
        prompts: The prompts that were kept.
        answers: Their answers, one each, if they are wanted.
        unanswered: Prompts that passed the filter and got no answer that can be used.
        left_out: Why prompts were left out -> how many.
    """

    prompts: Sequence[str] = ()
    answers: Sequence[str] | None = None
    unanswered: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


class SynthesisLog:
    """Reads and appends to the record of a synthesis. Creating it only checks; `begin` and `add` write.

    Args:
        path: The file.
        asked: What is asked for, as JSON can hold it.
        overwrite: Whether to begin anew where something else was asked for before.

    Attributes:
        rows: The rounds so far.

    Raises:
        PairsFolderError: If the file is of another request, and `overwrite` is off.
        CorruptFileError: If it is something else.
        FormatVersionError: If a newer version of the library wrote it.
    """

    def __init__(self, path: PathLike, asked: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._asked: dict[str, Any] = json.loads(json.dumps(dict(asked)))
        self.rows: list[dict[str, Any]] = []
        lines = self._lines()
        self._anew = not lines
        if not lines:
            return
        before = lines[0].get("asked")
        if before == self._asked:
            self.rows = lines[1:]
        elif overwrite:
            self._anew = True
        else:
            raise PairsFolderError(f"{str(self.path)!r} {_difference(before, self._asked)}")

    def begin(self) -> None:
        """Write the first line, unless the file has it."""
        if self._anew:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            head = {"format_version": FORMAT_VERSION, "peft_dnd_version": __version__, "asked": self._asked}
            append_lines(self.path, [head], ensure_ascii=False)
            self._anew = False
        take_off_half_line(self.path)

    def add(self, round_: Round) -> None:
        """Append a round."""
        pairs = zip(round_.prompts, round_.answers or (None,) * len(round_.prompts), strict=True)
        row = {
            "kept": [
                {"prompt": prompt} if answer is None else {"prompt": prompt, "answer": answer}
                for prompt, answer in pairs
            ],
            "unanswered": list(round_.unanswered),
            "left_out": dict(round_.left_out),
        }
        append_lines(self.path, [row], ensure_ascii=False)
        self.rows.append(row)

    def passed(self) -> list[str]:
        """All prompts that passed the filter so far, answered or not."""
        return [text for row in self.rows for text in (*(kept["prompt"] for kept in row["kept"]), *row["unanswered"])]

    def state(self, count: int) -> Synthesis:
        """What has been reached, of so many that are wanted."""
        kept = [row for round_ in self.rows for row in round_["kept"]][:count]
        left_out: Counter[str] = Counter()
        for row in self.rows:
            left_out.update(row["left_out"])
        answers = tuple(row["answer"] for row in kept) if kept and all("answer" in row for row in kept) else None
        prompts = tuple(row["prompt"] for row in kept)
        return Synthesis(prompts, answers, dict(left_out), len(self.rows), len(prompts) >= count)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in whole_lines(self.path)]
            if lines and lines[0]["format_version"] > FORMAT_VERSION:
                raise FormatVersionError(
                    f"{str(self.path)!r} is of format {lines[0]['format_version']}, of a newer peft_dnd; this is "
                    f"{__version__}, which reads formats up to {FORMAT_VERSION}. Upgrade: "
                    "pip install --upgrade peft-dnd."
                )
            for row in lines[1:]:
                _ = [item["prompt"] for item in row["kept"]], list(row["unanswered"]), dict(row["left_out"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, FormatVersionError):
                raise
            raise CorruptFileError(
                f"{str(self.path)!r} is no record of a synthesis ({error!r:.200}). Remove it, or name another output."
            ) from error
        return lines


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    known = before if isinstance(before, dict) else {}
    name = next(name for name in {**known, **now} if known.get(name) != now.get(name))
    return (
        f"holds what was written for another request: {name} was {known.get(name)!r:.80} and is "
        f"{now.get(name)!r:.80}. Pass overwrite=True (--overwrite) to begin anew, or name another output."
    )
