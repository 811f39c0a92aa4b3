# SPDX-License-Identifier: Apache-2.0
"""Prompts from where users of a shell have them: files, standard input, data sets of the Hub."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .console import CommandError, existing_file, suggestion


# As peft_dnd.text.prompt_files has them; help and wrong paths do not wait for the library, so not from there.
Format = Literal["text", "jsonl", "csv", "parquet"]
Row = dict[str, Any]
STANDARD_INPUT = "-"


def read_rows(source: str, column: str, file_format: Format | None = None) -> list[Row]:
    """Read the rows of a file, or of standard input.

    Args:
        source: The file, or `-`.
        column: The field that prompts stand in: a text file's lines become it.
        file_format: The file's format; by default as its name ends, and text where that says nothing.

    Raises:
        CommandError: If there is no such file.
        PeftDndError: If it is not what it should be, or it is empty.
    """
    path = None if source == STANDARD_INPUT else existing_file(Path(source), "The prompts' file")
    from peft_dnd.text.prompt_files import rows_of

    if path is None:
        return rows_of(sys.stdin.buffer.read(), "standard input", column, file_format)
    return rows_of(path.read_bytes(), repr(source), column, file_format, suffix=path.suffix)


def read_prompts(source: str, column: str, file_format: Format | None = None) -> list[str]:
    """Read the prompts alone; of a `.json` file too, as the paper's release has them.

    Raises:
        CommandError: As in `read_rows`.
        PeftDndError: As there, or if a row has no prompt.
    """
    if Path(source).suffix.lower() == ".json" and file_format is None:
        path = existing_file(Path(source), "The prompts' file")
        from peft_dnd.published.files import read_published_prompts

        return read_published_prompts(path)
    return texts_of(read_rows(source, column, file_format), column, source)


def texts_of(rows: Iterable[Row], column: str, source: str, *, are_answers: bool = False) -> list[str]:
    """One field of all rows, as text; of answers, a list of chat messages may end with the assistant's.

    Raises:
        PeftDndError: If a row lacks it, or holds something else than a text or chat messages there.
    """
    from peft_dnd.text.prompt_files import texts_of

    return texts_of(rows, column, source, are_answers=are_answers)


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


def files_of_tasks(folder: Path) -> dict[str, Path]:
    """The files of prompts in a folder: task, which is the name without its ending -> file.

    Raises:
        CommandError: If there are none.
        PromptError: If two are of one task.
    """
    from peft_dnd.text.prompt_files import ENDINGS, files_of_tasks

    found = files_of_tasks(folder)
    if not found:
        raise CommandError(
            f"{str(folder)!r} is a folder without a file of prompts. Give a file, or a folder with one file for each "
            f"task, whose name ends in one of {', '.join(ENDINGS)}."
        )
    return found
