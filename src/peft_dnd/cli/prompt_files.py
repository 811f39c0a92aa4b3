# SPDX-License-Identifier: Apache-2.0
"""Prompts from where users have them: text, JSONL, CSV and Parquet files, standard input, data sets of the Hub.

All of it becomes rows, field -> value; a text file has the field of the prompts alone.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .console import CommandError, existing_file, suggestion


Format = Literal["text", "jsonl", "csv", "parquet"]
STANDARD_INPUT = "-"

_SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_RELEASED = ".json"
# In characters. Nobody means a longer prompt, but a file without line breaks, which would fill the memory as tokens.
_LONGEST = 10_000_000
_SHAPE = 'Expected a text file with one prompt a line, a .jsonl with {{"{0}": "..."}} a line, or a .csv or .parquet.'

Row = dict[str, Any]


def read_rows(source: str, column: str, file_format: Format | None = None) -> list[Row]:
    """Read the rows of a file, or of standard input.

    Args:
        source: The file, or `-`.
        column: The field that prompts stand in: a text file's lines become it.
        file_format: The file's format; by default as its name ends, and text where that says nothing.

    Raises:
        CommandError: If there is no such file, it is not what it should be, or it is empty.
    """
    path = Path(source)
    if source == STANDARD_INPUT:
        content, name = sys.stdin.buffer.read(), "standard input"
    else:
        content, name = existing_file(path, "The prompts' file").read_bytes(), repr(source)
    kind = file_format or _SUFFIXES.get(path.suffix.lower(), "text")
    if kind == "parquet":
        rows = _parquet_rows(content, name)
    else:
        rows = _rows_of_text(_decoded(content, name), kind, column, name, "\t" if path.suffix == ".tsv" else ",")
    if not rows:
        raise CommandError(f"{name} is empty: there is no prompt in it. " + _SHAPE.format(column))
    return rows


def read_prompts(source: str, column: str, file_format: Format | None = None) -> list[str]:
    """Read the prompts alone; of a `.json` file too, as the paper's release has them.

    Raises:
        CommandError: As in `read_rows`, or if a row has no prompt.
    """
    if Path(source).suffix.lower() == _RELEASED and file_format is None:
        from peft_dnd.published.files import read_published_prompts

        return read_published_prompts(existing_file(Path(source), "The prompts' file"))
    return texts_of(read_rows(source, column, file_format), column, source)


def read_dataset(name: str, column: str, answer_column: str, *, config: str | None, split: str) -> list[Row]:
    """Read the prompts, and the answers if there are any, of a data set of the Hub, or a folder of one.

    Raises:
        CommandError: If `datasets` is not installed, or there is no such data set, split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise CommandError("To read a data set, install the library for it: pip install datasets") from error
    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"The data set {name!r}, split {split!r}, cannot be read: {error}. Check the name and the split, and "
            "whether the network is allowed."
        ) from error
    if column not in found.column_names:
        raise CommandError(f"The data set {name!r} has no column {column!r}.{suggestion(column, found.column_names)}")
    wanted = [name for name in (column, answer_column) if name in found.column_names]
    return [dict(row) for row in found.select_columns(wanted)]


def texts_of(rows: Iterable[Row], column: str, source: str, *, are_answers: bool = False) -> list[str]:
    """One field of all rows, as text; of answers, a list of chat messages may end with the assistant's.

    Raises:
        CommandError: If a row lacks it, or holds something else than a text or chat messages there.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise CommandError(
                f"Row {number} of {source!r} has no {column!r}.{suggestion(column, row)} Name the field with an "
                "option, or mend the file. " + _SHAPE.format(column)
            )
        texts.append(_text_of(row[column], f"{column!r} in row {number} of {source!r}", are_answers=are_answers))
    return texts


def _text_of(value: Any, what: str, *, are_answers: bool) -> str:
    """A text as it is, or that of a list of chat messages."""
    if isinstance(value, list):
        from peft_dnd.errors import PeftDndError
        from peft_dnd.text.prompt_shapes import text_of

        try:
            value = text_of(value, what, are_answers=are_answers)
        except PeftDndError as error:
            raise CommandError(str(error)) from error
    if not isinstance(value, str):
        raise CommandError(f"{what} must be a text or a list of chat messages, found {value!r:.60}.")
    if len(value) > _LONGEST:
        raise CommandError(
            f"{what} has {len(value):,} characters; the most are {_LONGEST:,}. A text file has one prompt a line: if "
            "it is of another form, name it so. Otherwise cut the prompt."
        )
    return value


def files_of_tasks(folder: Path) -> dict[str, Path]:
    """The files of prompts in a folder: task, which is the name without its ending -> file.

    Raises:
        CommandError: If there are none, or two of one task.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix.lower() not in (*_SUFFIXES, _RELEASED) or path.name.startswith("."):
            continue
        if path.stem in found:
            raise CommandError(f"{str(found[path.stem])!r} and {str(path)!r} are both of task {path.stem!r}.")
        found[path.stem] = path
    if not found:
        raise CommandError(
            f"{str(folder)!r} is a folder without a file of prompts. Give a file, or a folder with one file for each "
            f"task, whose name ends in one of {', '.join((*_SUFFIXES, _RELEASED))}."
        )
    return found


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not in UTF-8 ({error}). Save it in UTF-8, or give another file.") from error


def _rows_of_text(text: str, kind: Format, column: str, name: str, delimiter: str) -> list[Row]:
    # Not splitlines: a prompt may hold any of the other characters that it takes for the end of a line.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == "text":
        return [{column: line.rstrip("\r")} for _, line in lines]
    if kind == "jsonl":
        return [_json_row(line, number, column, name) for number, line in lines]
    return _csv_rows(text, name, delimiter)


def _csv_rows(text: str, name: str, delimiter: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:  # where the reader puts what is too much: most likely the rest of a prompt
                raise CommandError(
                    f"Line {reader.line_num} of {name} has {len(row) - 1 + len(row[None])} fields, and the header "
                    f"names {len(row) - 1}. Put a text that holds {delimiter!r} in quotes, or save it as .jsonl."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise CommandError(f"{name} is no readable CSV file ({error}). Mend it, or save it as .jsonl.") from error
    return rows


def _json_row(line: str, number: int, column: str, name: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row = error
    if not isinstance(row, dict):
        what = f"it is not JSON ({row})" if isinstance(row, Exception) else f"found {line!r:.60}"
        raise CommandError(f"Line {number} of {name} is no JSON object: {what}. " + _SHAPE.format(column))
    return row


def _parquet_rows(content: bytes, name: str) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CommandError("To read Parquet files, install the library for them: pip install pyarrow") from error
    try:
        rows: list[Row] = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CommandError(f"{name} is no readable Parquet file ({error}).") from error
    return rows
