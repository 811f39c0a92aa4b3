# SPDX-License-Identifier: Apache-2.0
"""Lists of adapters as users have them: a YAML file, a folder with an adapter's folder for each task, one adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .console import CommandError, existing_file
from .prompt_files import read_dataset, read_prompts, read_rows, texts_of
from .recipes import check_names, read_yaml


_YAML = (".yaml", ".yml")
_CARD = "card"
_OF_TASK = ("task", "adapter", "revision", "subfolder", "sha256", "config_sha256", "prompts")
_OF_ADAPTER = ("adapter", "revision", "subfolder", "sha256", "config_sha256")
_OF_PROMPTS = ("file", "dataset", "config", "split", "column", "answer_column")


@dataclass
class AdapterList:
    """What is to be imported, as `import_adapters` takes it.

    Attributes:
        adapters: Task -> for each of its adapters what `ExistingAdapter` takes.
        prompts: Task -> its prompts, or `"card"`.
        answers: Task -> their answers, where there are any.
    """

    adapters: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)

    def add_prompts(self, task: str, source: Any, column: str, answer_column: str | None) -> None:
        """Read a task's prompts: a file, `"card"`, or what a list's `prompts` says of a file or a data set.

        Raises:
            CommandError: If they cannot be read.
        """
        if source == _CARD:
            self.prompts[task] = _CARD
            return
        described = source if isinstance(source, dict) else {"file": source}
        check_names(described, _OF_PROMPTS, f"'prompts' of task {task!r}")
        column = described.get("column", column)
        answer_column = described.get("answer_column", answer_column)
        name, file = described.get("dataset"), described.get("file")
        if (name is None) == (file is None):
            raise CommandError(f"'prompts' of task {task!r} must name a file or a dataset, found {source!r:.60}.")
        if name is not None:
            split, config = described.get("split", "train"), described.get("config")
            rows = read_dataset(str(name), column, answer_column or "", config=config, split=split)
        elif answer_column is None:
            self.prompts[task] = read_prompts(str(file), column)
            return
        else:
            rows = read_rows(str(file), column)
        self.prompts[task] = texts_of(rows, column, str(name or file))
        if answer_column is not None:
            self.answers[task] = texts_of(rows, answer_column, str(name or file))


def read_adapter_list(source: str, column: str, answer_column: str | None) -> AdapterList:
    """Read a list of adapters, and the prompts that it names.

    Args:
        source: A YAML file, that names each task's adapter and prompts; a folder with an adapter's folder for each
            task; an adapter's folder or Hub id, whose task is called as its last part.
        column: The field that prompts stand in.
        answer_column: That of their answers, if they are to be read.

    Raises:
        CommandError: If there is no such file, or it is not of that form.
    """
    found = AdapterList()
    path = Path(source)
    if path.suffix.lower() in _YAML:
        data = read_yaml(existing_file(path, "The list of adapters").read_text("utf-8", errors="replace"), source)
        for task, entry in _entries(data, source):
            _add(found, task, entry, source, column, answer_column)
    elif path.is_dir() and not _is_of_one_task(path):
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                found.adapters[folder.name] = [{"name_or_path": str(folder)}]
    else:
        if not path.exists() and len(path.parts) == 1:
            existing_file(path, "The list or folder of adapters")  # no Hub id either: those name their owner
        if path.is_file():
            raise CommandError(f"{source!r} is no list of adapters: expected a .yaml file, a folder or a Hub id.")
        found.adapters[_last_part(source)] = [{"name_or_path": source}]
    if not found.adapters:
        raise CommandError(f"There is no adapter in {source!r}. Expected a folder for each task's adapter in it.")
    return found


def _entries(data: Any, source: str) -> list[tuple[str | None, Any]]:
    if isinstance(data, dict):
        return [(str(task), entry) for task, entry in data.items()]
    if isinstance(data, list):
        return [(None, entry) for entry in data]
    raise CommandError(
        f"{source!r} must hold a list of adapters, or tasks and their adapters (law: {{adapter: ..., prompts: ...}}); "
        f"found {data!r:.60}."
    )


def _add(
    found: AdapterList, task: str | None, entry: Any, source: str, column: str, answer_column: str | None
) -> None:
    described = dict(entry) if isinstance(entry, dict) else {"adapter": entry}
    check_names(described, _OF_TASK if task is None else _OF_TASK[1:], f"{task or 'An entry'!r} of {source!r}")
    given = described.get("adapter")
    several = given if isinstance(given, list) else [given]
    adapters = [_adapter(each, described, source) for each in several]
    task = task or described.get("task") or _last_part(adapters[0]["name_or_path"])
    if task in found.adapters:
        raise CommandError(f"{source!r} has two entries for the task {task!r}. Give each a name of its own: task: ...")
    found.adapters[task] = adapters
    if described.get("prompts") is not None:
        found.add_prompts(task, described["prompts"], column, answer_column)


def _adapter(given: Any, described: Mapping[str, Any], source: str) -> dict[str, Any]:
    own = dict(given) if isinstance(given, dict) else {"adapter": given}
    check_names(own, _OF_ADAPTER, f"An adapter of {source!r}")
    values = {name: described[name] for name in _OF_ADAPTER[1:] if name in described}
    values.update({name: own[name] for name in _OF_ADAPTER[1:] if name in own})
    # YAML reads a revision or a digest of figures alone as a number, and would lose its leading zeros.
    wrong = [name for name, value in {**values, "adapter": own.get("adapter")}.items() if not isinstance(value, str)]
    if wrong:
        value = {**values, "adapter": own.get("adapter")}[wrong[0]]
        raise CommandError(f"{wrong[0]!r} in {source!r} must be a text, in quotes if need be; found {value!r:.60}.")
    return {"name_or_path": own["adapter"], **values}


def _is_of_one_task(folder: Path) -> bool:
    """Whether a folder is that of an adapter, or what a Trainer leaves."""
    return (folder / "adapter_config.json").is_file() or any(
        re.fullmatch(r"checkpoint-\d+", path.name) for path in folder.iterdir()
    )


def _last_part(name: str) -> str:
    return Path(name).name or Path(name).absolute().name
