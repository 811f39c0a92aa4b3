# SPDX-License-Identifier: Apache-2.0
"""Adapters generated in the engine's own process: a generator, and a folder with a file of prompts for each task."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from ..errors import CorruptFileError, EngineError, PromptError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..storage.files import PathLike
from .kept_adapters import KeptAdapters, parse_name


logger = logging.getLogger(__name__)

_SUFFIXES = (".txt", ".jsonl")


class TaskFolder:
    """The adapters of the tasks in a folder, generated when they are asked for, each once a process.

    Args:
        generator: Folder or Hub id of the generator. It is loaded, onto the CPU, when the first task is asked for.
        tasks: Folder of prompt files: `law.txt` with one prompt a line, or `law.jsonl` with `{"prompt": "..."}` a line
            (and `"answer"`, for a generator that reads answers) is task `law`. It is looked at anew for each request.
        cache: Folder to keep adapters in; it is made where missing.

    Raises:
        EngineError: If there is no such folder of tasks.
    """

    def __init__(self, generator: str, tasks: PathLike, cache: PathLike) -> None:
        self._generator_name, self._tasks = generator, Path(tasks).expanduser().absolute()
        if not self._tasks.is_dir():
            raise EngineError(
                f"There is no folder of tasks {str(self._tasks)!r}. Make it, with a file of prompts for each task: "
                "law.txt with one a line, for instance."
            )
        self._kept = KeptAdapters(cache)
        self._generator: PromptConditionedLoraGenerator | None = None
        self._lock = threading.Lock()

    def find(self, name: str) -> Path | None:
        """The folder of an adapter, generated where it is a task's.

        Args:
            name: `dnd:` and the id of an adapter that was generated before; or the name of a task, with `dnd:` before
                it or without.

        Returns:
            The folder; `None` if there is no such task or adapter.

        Raises:
            GeneratorNotFoundError: If there is no such generator.
            CorruptFileError: If the task's file is none of prompts.
            PromptError: If it holds none, or has no answers for a generator that reads them.
        """
        parsed = parse_name(name)
        if parsed is None:
            return None
        if parsed.adapter_id is not None:
            return self._kept.folder_of(parsed.adapter_id)
        # Looked up among the names that are there: no path is made of what was asked for.
        file = self._files().get(parsed.task)
        return None if file is None else self._generated(parsed.task, file)

    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self._tasks.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file():
                if path.stem in found:
                    raise EngineError(
                        f"{found[path.stem].name!r} and {path.name!r} in {str(self._tasks)!r} are both of task "
                        f"{path.stem!r}. Keep one of them."
                    )
                found[path.stem] = path
        return found

    def _generated(self, task: str, file: Path) -> Path:
        prompts, answers = read_prompt_file(file)
        with self._lock:  # neither the generator nor its text encoder is made for several threads at once
            if self._generator is None:
                self._generator = PromptConditionedLoraGenerator.from_pretrained(self._generator_name)
            reads_answers = self._generator.config.condition_text != "prompts"
            adapter = self._generator.generate_adapter(prompts, answers=answers if reads_answers else None)
        place = self._kept.keep(adapter)
        logger.info("generated the adapter of task %r: %s", task, place.name)
        return place


def read_prompt_file(path: PathLike) -> tuple[list[str], list[str] | None]:
    """Read the prompts of a text file, one a line, or of a `.jsonl`, and their answers where all have one.

    Raises:
        CorruptFileError: If it is not in UTF-8, or a line is not as it should be.
        PromptError: If there is no prompt in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{str(path)!r} is not in UTF-8 ({error}). Save it in UTF-8.") from error
    lines = {number: line.rstrip("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise PromptError(f"{str(path)!r} is empty: expected one prompt a line.")
    if path.suffix != ".jsonl":
        return list(lines.values()), None
    rows = [_row(line, number, path) for number, line in lines.items()]
    answers = [row["answer"] for row in rows if isinstance(row.get("answer"), str)]
    return [row["prompt"] for row in rows], answers if len(answers) == len(rows) else None


def _row(line: str, number: int, path: Path) -> dict[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise CorruptFileError(
            f'Line {number} of {str(path)!r} is no {{"prompt": "..."}}, but {line!r:.60}. Mend that line.'
        )
    return row
