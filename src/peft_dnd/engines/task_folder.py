# SPDX-License-Identifier: Apache-2.0
"""Adapters generated in the engine's own process: a generator, and a folder with a file of prompts for each task."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from ..errors import EngineError, PromptError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..published.files import read_published_prompts
from ..storage.files import PathLike
from ..text.prompt_files import RELEASED, Row, files_of_tasks, read_rows, texts_of
from ..text.prompt_shapes import PROMPT_COLUMN
from .kept_adapters import KeptAdapters, parse_name


logger = logging.getLogger(__name__)

_ANSWER_COLUMN = "answer"


class TaskFolder:
    """The adapters of the tasks in a folder, generated when they are asked for, each once a process.

    Args:
        generator: Folder or Hub id of the generator. It is loaded, onto the CPU, when the first task is asked for.
        tasks: Folder of prompt files: `law.txt` with one prompt a line, or `law.jsonl` with `{"prompt": "..."}` a line
            (and `"answer"`, for a generator that reads answers) is task `law`; or a `.csv` or `.parquet` with such
            columns. It is looked at anew for each request.
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
        try:
            return files_of_tasks(self._tasks)
        except PromptError as error:
            raise EngineError(str(error)) from error

    def _generated(self, task: str, file: Path) -> Path:
        rows = _rows(file)
        with self._lock:  # neither the generator nor its text encoder is made for several threads at once
            if self._generator is None:
                self._generator = PromptConditionedLoraGenerator.from_pretrained(self._generator_name)
            reads_answers = self._generator.config.condition_text != "prompts"
            answered = reads_answers and all(_ANSWER_COLUMN in row for row in rows)
            adapter = self._generator.generate_adapter(
                texts_of(rows, PROMPT_COLUMN, file.name),
                answers=texts_of(rows, _ANSWER_COLUMN, file.name, are_answers=True) if answered else None,
            )
        place = self._kept.keep(adapter)
        logger.info("generated the adapter of task %r: %s", task, place.name)
        return place


def _rows(file: Path) -> list[Row]:
    if file.suffix.lower() != RELEASED:
        return read_rows(file, PROMPT_COLUMN)
    return [{PROMPT_COLUMN: prompt} for prompt in read_published_prompts(file)]
