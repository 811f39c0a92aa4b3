# SPDX-License-Identifier: Apache-2.0
"""A task's pool of unlabelled prompts on disk: `prompts.jsonl` in its folder, with or without answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import CorruptFileError, PairsFolderError
from ..storage.files import PathLike, write_text


PROMPTS_NAME = "prompts.jsonl"


def write_prompts(folder: PathLike, prompts: Sequence[str], answers: Sequence[str] | None = None) -> None:
    """Write a task's pool of prompts, and their answers if there are any, whole or not at all."""
    rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts]
    if answers is not None:
        rows = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(Path(folder) / PROMPTS_NAME, "\n".join(lines) + "\n")


def read_prompts(folder: PathLike) -> tuple[str, ...]:
    """Read a task's pool of prompts.

    Raises:
        PairsFolderError: If there is no such file, or no prompt in it.
        CorruptFileError: If a line is not as `write_prompts` writes it.
    """
    path = Path(folder) / PROMPTS_NAME
    if not path.is_file():
        raise PairsFolderError(
            f"Task {Path(folder).name!r} has no {PROMPTS_NAME}. Write its unlabelled prompts to {str(path)!r}, one "
            '{"prompt": "..."} a line, or collect the task again.'
        )
    prompts = tuple(_text_of(line, "prompt", number, path) for number, line in _rows(path))
    if not prompts:
        raise PairsFolderError(
            f"Task {Path(folder).name!r} has no prompts: {str(path)!r} is empty. Write its unlabelled prompts there, "
            'one {"prompt": "..."} a line, or collect the task again.'
        )
    return prompts


def read_answers(folder: PathLike) -> tuple[str, ...] | None:
    """Read the answers to a task's prompts; `None` if there are none.

    Raises:
        PairsFolderError: If some prompts have an answer and others have none.
        CorruptFileError: If a line is not as `write_prompts` writes it.
    """
    path = Path(folder) / PROMPTS_NAME
    rows = _rows(path)
    answered = [number for number, line in rows if b'"answer"' in line and "answer" in json.loads(line)]
    if not answered:
        return None
    if len(answered) < len(rows):
        without = next(number for number, _ in rows if number not in answered)
        raise PairsFolderError(
            f"Line {without} of {str(path)!r} has no answer, and {len(answered)} of its {len(rows)} lines have one. "
            "Give all prompts an answer, or none."
        )
    return tuple(_text_of(line, "answer", number, path) for number, line in rows)


def _rows(path: Path) -> list[tuple[int, bytes]]:
    # Not splitlines: a prompt may hold any of the other characters that it takes for the end of a line.
    return [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]


def _text_of(line: bytes, field: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)[field]
        if not isinstance(text, str):
            raise TypeError(f"expected str, found {text!r}")
        return text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(
            f'Line {number} of {str(path)!r} is not {{"{field}": "..."}} ({error!r:.200}). The file may have been cut '
            "short or edited by hand: mend that line, or collect the task again."
        ) from error
