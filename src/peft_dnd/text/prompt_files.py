# SPDX-License-Identifier: Apache-2.0
"""Prompts from the files that users have them in: text, JSONL, CSV, Parquet, and the paper's release.

All of it becomes rows, field -> value; a text file has the field of the prompts alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import CorruptFileError, PromptError, did_you_mean
from .prompt_shapes import text_of


if TYPE_CHECKING:
    from ..storage.files import PathLike


Format: TypeAlias = Literal["text", "jsonl", "csv", "parquet"]
Row: TypeAlias = dict[str, Any]

RELEASED = ".json"
"""How the names of the paper's files of prompts end."""

_SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
ENDINGS = (*_SUFFIXES, RELEASED)
"""How the names of files of prompts end."""

# In characters. Nobody means a longer prompt, but a file without line breaks, which would fill the memory as tokens.
_LONGEST = 10_000_000
_SHAPE = 'Expected a text file with one prompt a line, a .jsonl with {{"{0}": "..."}} a line, or a .csv or .parquet.'


def read_rows(path: PathLike, column: str = "prompt", file_format: Format | None = None) -> list[Row]:
    """Read the rows of a file.

    Args:
        path: The file.
        column: The field that prompts stand in: a text file's lines become it.
        file_format: The file's format; by default as its name ends, and text where that says nothing.

    Raises:
        CorruptFileError: If it is not what it should be.
        PromptError: If there is nothing in it, or the library for Parquet files is not installed.
    """
    path = Path(path)
    return rows_of(path.read_bytes(), repr(str(path)), column, file_format, suffix=path.suffix)


def rows_of(
    content: bytes, name: str, column: str = "prompt", file_format: Format | None = None, *, suffix: str = ""
) -> list[Row]:
    """The rows of what was read from somewhere.

    Args:
        content: What was read.
        name: What error messages call it.
        column: As for [`read_rows`].
        file_format: As for [`read_rows`].
        suffix: How the file's name ends, `".csv"` for instance.

    Raises:
        CorruptFileError: As in `read_rows`.
        PromptError: As there.
    """
    kind = file_format or _SUFFIXES.get(suffix.lower(), "text")
    if kind == "parquet":
        rows = _parquet_rows(content, name)
    else:
        rows = _rows_of_text(_decoded(content, name), kind, column, name, "\t" if suffix.lower() == ".tsv" else ",")
    if not rows:
        raise PromptError(f"{name} is empty: there is no prompt in it. " + _SHAPE.format(column))
    return rows


def files_of_tasks(folder: Path) -> dict[str, Path]:
    """The files of prompts in a folder: task, which is the name without its ending -> file.

    Raises:
        PromptError: If two are of one task.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix.lower() not in ENDINGS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise PromptError(
                f"{found[path.stem].name!r} and {path.name!r} in {str(folder)!r} are both of task {path.stem!r}. "
                "Keep one of them."
            )
        found[path.stem] = path
    return found


def texts_of(rows: Iterable[Row], column: str, source: str, *, are_answers: bool = False) -> list[str]:
    """One field of all rows, as text; of answers, a list of chat messages may end with the assistant's.

    Raises:
        CorruptFileError: If a row lacks it, or holds something else than a text or chat messages there.
        PromptError: If chat messages are not as they should be.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise CorruptFileError(
                f"Row {number} of {source!r} has no {column!r}.{_suggestion(column, row)} Mend the file, or say "
                "which field it is. " + _SHAPE.format(column)
            )
        texts.append(_text_of(row[column], f"{column!r} in row {number} of {source!r}", are_answers=are_answers))
    return texts


def _text_of(value: Any, what: str, *, are_answers: bool) -> str:
    """A text as it is, or that of a list of chat messages."""
    if isinstance(value, list):
        value = text_of(value, what, are_answers=are_answers)
    if not isinstance(value, str):
        raise CorruptFileError(f"{what} must be a text or a list of chat messages, found {value!r:.60}.")
    if len(value) > _LONGEST:
        raise CorruptFileError(
            f"{what} has {len(value):,} characters; the most are {_LONGEST:,}. A text file has one prompt a line: if "
            "it is of another form, name it so. Otherwise cut the prompt."
        )
    return value


def _suggestion(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, known) or f" Known: {', '.join(sorted(known)) or 'none'}."


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{name} is not in UTF-8 ({error}). Save it in UTF-8, or give another file.") from error


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
                raise CorruptFileError(
                    f"Line {reader.line_num} of {name} has {len(row) - 1 + len(row[None])} fields, and the header "
                    f"names {len(row) - 1}. Put a text that holds {delimiter!r} in quotes, or save it as .jsonl."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise CorruptFileError(f"{name} is no readable CSV file ({error}). Mend it, or save it as .jsonl.") from error
    return rows


def _json_row(line: str, number: int, column: str, name: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row = error
    if not isinstance(row, dict):
        what = f"it is not JSON ({row})" if isinstance(row, Exception) else f"found {line!r:.60}"
        raise CorruptFileError(f"Line {number} of {name} is no JSON object: {what}. " + _SHAPE.format(column))
    return row


def _parquet_rows(content: bytes, name: str) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PromptError("To read Parquet files, install the library for them: pip install pyarrow") from error
    try:
        rows: list[Row] = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFileError(f"{name} is no readable Parquet file ({error}).") from error
    return rows
