# SPDX-License-Identifier: Apache-2.0
"""What a teacher said to a task's inputs, on disk beside the task: its answers and its top next-token probabilities.

    pairs/<task>/distillation.json     who the teacher was, what it was asked and how, whether it came to the end
    pairs/<task>/distillation.jsonl    one input a line, whose fields are those of a row of `examples.jsonl`
                                       (`input_ids` and `labels`, the answer's tokens) and, for each of the answer's
                                       tokens, `top_tokens` and `top_log_probs`, the teacher's k likeliest ones, if
                                       these were kept

While the teacher is at work the lines stand in `distillation.partial.jsonl`, to which whole lines are appended, so
that a pass that was killed goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, FormatVersionError, PairsFolderError
from ..storage.appended_lines import append_lines, take_off_half_line, whole_lines
from ..storage.files import PathLike, read_json, write_json
from ..version import __version__
from .examples import TaskExamples


FORMAT_VERSION = 1
RECORD_NAME = "distillation.json"
ROWS_NAME = "distillation.jsonl"
PARTIAL_NAME = "distillation.partial.jsonl"


@dataclass(frozen=True)
class DistillationRecord:
    """What a task's `distillation.json` says.

    Attributes:
        teacher: Who the teacher was: `base`, the digest of its base model's weights; `adapter`, that of the adapter it
            carried, or `None`; `name`, what it is called.
        asked: What it was asked and how: the digest of what stood in its window, input by input, and its settings.
        rows: How many inputs there are.
        complete: Whether the teacher came to the end.
        student: The digest of the base that is to learn from it, where that is another than the teacher's.
        peft_dnd_version: Version of the library that wrote it.
    """

    teacher: Mapping[str, str | None]
    asked: Mapping[str, Any]
    rows: int
    complete: bool = False
    student: str | None = None
    peft_dnd_version: str = field(default=__version__, compare=False)


def write_record(folder: PathLike, record: DistillationRecord) -> None:
    """Write a task's `distillation.json`, whole or not at all."""
    write_json(Path(folder) / RECORD_NAME, {"format_version": FORMAT_VERSION, **asdict(record)})


def read_record(folder: PathLike) -> DistillationRecord | None:
    """Read a task's `distillation.json`; `None` if it has none.

    Raises:
        FormatVersionError: If a newer version of the library wrote it.
        CorruptFileError: If it is not readable, or lacks a field.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        if data["format_version"] > FORMAT_VERSION:
            raise FormatVersionError(
                f"{str(path)!r} is of format {data['format_version']}, written by peft_dnd "
                f"{data.get('peft_dnd_version', '?')}; this is peft_dnd {__version__}, which reads formats up to "
                f"{FORMAT_VERSION}. Upgrade: pip install --upgrade peft-dnd."
            )
        return DistillationRecord(
            teacher=dict(data["teacher"]),
            asked=dict(data["asked"]),
            rows=int(data["rows"]),
            complete=data["complete"] is True,
            student=None if data.get("student") is None else str(data["student"]),
            peft_dnd_version=str(data.get("peft_dnd_version", "unknown")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, FormatVersionError):
            raise
        raise CorruptFileError(
            f"{str(path)!r} does not describe a teacher's answers: {error!r}. Have the task distilled again."
        ) from error


def load_distillation(folder: PathLike) -> TaskExamples | None:
    """A task's distilled rows; `None` if there are none, or the teacher has not come to the end.

    Raises:
        CorruptFileError: If a file is unreadable, or there are fewer rows than the record says.
        FormatVersionError: If a newer version of the library wrote it.
    """
    record = read_record(folder)
    if record is None or not record.complete:
        return None
    rows = TaskExamples(Path(folder) / ROWS_NAME)
    if len(rows) != record.rows:
        raise CorruptFileError(
            f"{str(rows.path)!r} holds {len(rows)} rows, but {RECORD_NAME} says {record.rows}. It was cut short or "
            "edited by hand: have the task distilled again, with overwrite=True."
        )
    return rows


class DistillationWriter:
    """Appends a teacher's rows to a task's folder, goes on where an earlier pass stopped, and closes the file.

    Creating it only checks; [`begin`][DistillationWriter.begin] writes.

    Args:
        folder: The task's folder.
        record: Who is asked, and what; not complete.
        overwrite: Whether to begin anew where another teacher, or other inputs, were at work.

    Attributes:
        done: How many rows there are already, once begun.

    Raises:
        PairsFolderError: If the folder holds what another teacher said, or what this one said to other inputs, and
            `overwrite` is off.
    """

    def __init__(self, folder: PathLike, record: DistillationRecord, *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._record = record
        self._partial = self.folder / PARTIAL_NAME
        found = read_record(self.folder)
        same = found is not None and replace(found, complete=record.complete) == record
        if found is not None and not same and not overwrite:
            raise PairsFolderError(_difference(self.folder, found, record))
        self._same = same
        self._finished = found is not None and same and found.complete and load_distillation(self.folder) is not None
        self.done = record.rows if self._finished else 0

    def begin(self) -> None:
        """Lay out the files, without what was there of another pass than this one."""
        if self._finished:
            return
        rows = self.folder / ROWS_NAME
        if not self._same:
            self._partial.unlink(missing_ok=True)
        elif rows.is_file() and not self._partial.is_file():
            os.replace(rows, self._partial)  # all but the record was written when the pass was killed
        rows.unlink(missing_ok=True)
        write_record(self.folder, self._record)
        take_off_half_line(self._partial)
        self.done = len(whole_lines(self._partial))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and have them on the disk."""
        self.done += append_lines(self._partial, rows)

    def close(self) -> None:
        """Mark the rows as complete.

        Raises:
            PairsFolderError: If some are missing.
        """
        if self.done != self._record.rows:
            raise PairsFolderError(
                f"The teacher gave {self.done} of {self._record.rows} rows for {str(self.folder)!r}."
            )
        if self._partial.is_file():
            os.replace(self._partial, self.folder / ROWS_NAME)
        write_record(self.folder, replace(self._record, complete=True))


def _difference(folder: Path, found: DistillationRecord, record: DistillationRecord) -> str:
    start = f"{str(folder)!r} holds what a teacher said already"
    mend = "Pass overwrite=True (--overwrite) to begin anew, or name another folder."
    for key, what in (("base", "another base"), ("adapter", "another adapter")):
        if found.teacher.get(key) != record.teacher.get(key):
            return (
                f"{start}, but that was {what}: {found.teacher.get('name')!r} with {key} {found.teacher.get(key)}; "
                f"this one is {record.teacher.get('name')!r} with {key} {record.teacher.get(key)}. {mend}"
            )
    if found.student != record.student:
        then, now = (one.student or one.teacher.get("base") for one in (found, record))
        return f"{start}, but for another student: the base with the digest {then}; this one is {now}. {mend}"
    names = {**found.asked, **record.asked}
    different = [name for name in names if found.asked.get(name) != record.asked.get(name)]
    first = different[0] if different else "rows"
    before, after = (found.asked.get(first), record.asked.get(first)) if different else (found.rows, record.rows)
    return f"{start}, but it was asked something else: {first} was {before!r} and is {after!r}. {mend}"
