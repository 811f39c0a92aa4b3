# SPDX-License-Identifier: Apache-2.0
"""From a data set's rows to prompts, answers and pictures."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from recipe import DataSet, HubArchive, RecipeError


logger = logging.getLogger("recipes")

_TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
# The harness has the same filter for its templates.
_TEMPLATES.filters["regex_replace"] = lambda text, pattern, new: re.sub(pattern, new, text)


@dataclass(frozen=True)
class Example:
    """A prompt, its answer if there is one, and the picture that goes before the prompt, if there is one."""

    prompt: str
    answer: str | None = None
    image: Image.Image | None = None


def render(template: str, row: dict[str, Any], what: str) -> str:
    """Fill a template with a row's columns.

    Args:
        template: A Jinja template.
        row: Column -> value.
        what: Whose it is, for the error.

    Raises:
        RecipeError: If the template is none, or names a column that the row lacks.
    """
    try:
        return _template(template).render(**row)
    except UndefinedError as error:
        raise RecipeError(f"{what}: {error}. The columns are {', '.join(row)}. Mend the template.") from error
    except (TemplateError, ValueError, IndexError, TypeError) as error:
        raise RecipeError(f"{what}: the template {template!r} fails on the row {row}: {error}") from error


def to_example(data_set: DataSet, row: dict[str, Any], name: str) -> Example | None:
    """Make an example of a row; `None` of one that is not to be kept, or whose prompt or answer is empty."""
    if data_set.keep is not None and render(data_set.keep, row, name).strip() in ("", "False", "0"):
        return None
    prompt = render(data_set.prompt, row, name)
    answer = None if data_set.answer is None else render(data_set.answer, row, name)
    if not prompt.strip() or (answer is not None and not answer.strip()):
        return None
    return Example(prompt, answer, None if data_set.image is None else _image(data_set, row, name))


def load_examples(data_set: DataSet, name: str, limit: int, seed: int) -> list[Example]:
    """Draw examples of a data set from the Hub.

    Args:
        data_set: Which.
        name: Its name in the recipe.
        limit: At most how many.
        seed: Which ones.

    Raises:
        RecipeError: If a template does not fit the rows, or none of them gives an example.
    """
    configs = data_set.config if isinstance(data_set.config, list) else [data_set.config]
    parts = [
        datasets.load_dataset(
            data_set.hub_id, config, split=data_set.split, revision=data_set.revision, data_files=data_set.data_files
        )
        for config in configs
    ]
    rows = datasets.concatenate_datasets(parts).shuffle(seed=seed)
    examples, left_out = [], 0
    for row in rows:
        example = to_example(data_set, row, name)
        left_out += example is None
        if example is not None:
            examples.append(example)
        if len(examples) == limit:
            break
    if not examples:
        raise RecipeError(f"{name}: none of the {len(rows)} rows of {data_set.hub_id} gives a prompt.")
    if left_out:
        logger.info("%s: %d rows without a prompt or an answer were left out.", name, left_out)
    return examples


def messages(example: Example) -> dict[str, Any]:
    """An example as TRL's trainers take one: a conversation of prompt and completion, with its picture."""
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": example.prompt}],
        "completion": [{"role": "assistant", "content": example.answer}],
    }
    return row if example.image is None else {**row, "images": [example.image]}


def archived_file(source: HubArchive, folder: Path) -> Path:
    """Take a file out of an archive on the Hub.

    Args:
        source: Which.
        folder: Where it goes, unless it is there.
    """
    target = folder / Path(str(source.file)).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_read(source, str(source.file)))
    return target


@lru_cache(maxsize=256)
def _template(text: str) -> Template:
    return _TEMPLATES.from_string(text)


def _image(data_set: DataSet, row: dict[str, Any], name: str) -> Image.Image:
    found = row.get(str(data_set.image))
    if isinstance(found, str) and data_set.image_archive is not None:
        found = Image.open(io.BytesIO(_read(data_set.image_archive, found)))
    if not isinstance(found, Image.Image):
        raise RecipeError(f"{name}: the column {data_set.image!r} holds no picture, but {found!r}.")
    return found.convert("RGB")


def _read(source: HubArchive, file: str) -> bytes:
    archive, members = _open(source)
    if file not in members:
        raise RecipeError(f"{source.archive} in {source.hub_id} holds no file {file!r}.")
    return archive.read(members[file])


@lru_cache(maxsize=4)
def _open(source: HubArchive) -> tuple[zipfile.ZipFile, dict[str, str]]:
    path = huggingface_hub.hf_hub_download(source.hub_id, source.archive, repo_type=source.repo_type)
    archive = zipfile.ZipFile(path)
    # Rows name pictures from below some folder of the archive, so every ending of a path finds its file.
    members: dict[str, str] = {}
    for member in archive.namelist():
        parts = member.split("/")
        for start in range(len(parts)):
            members.setdefault("/".join(parts[start:]), member)
    return archive, members
