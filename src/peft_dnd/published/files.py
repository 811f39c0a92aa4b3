# SPDX-License-Identifier: Apache-2.0
"""Reading the files that the release of arXiv 2506.16406 consists of: the one place where a pickle is read."""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapters.names import natural_key
from ..errors import CorruptFileError, MissingFileError, PromptError
from ..storage.files import PathLike, read_json, read_safetensors


_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def read_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Read a state dict: from safetensors, or from what `torch.save` wrote, of which tensors alone are unpickled.

    Args:
        path: The file; one that does not end in `.safetensors` is taken for a pickle.

    Returns:
        Key -> tensor, on the CPU. Those of a large pickle stay on disk until they are looked at.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it cannot be read, or holds anything but tensors under names.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {str(path)!r}.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        # Only the zip format that torch.save writes since 1.6 can be mapped into memory.
        loaded = torch.load(  # noqa: TID251 (the release has nothing else; weights_only keeps code out)
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # a damaged pickle can raise anything
        # In a file that was cut short torch seeks to before its start, which the system calls an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # torch's own words would advise to load the file as code.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "more or other than tensors" if unsafe else str(error).partition("\n")[0]
        raise CorruptFileError(
            f"{str(path)!r} cannot be read as tensors saved by torch.save ({type(error).__name__}: {reason:.200}). It "
            "was cut short, is another kind of file, or holds more than tensors, which may be code and is not loaded."
        ) from error
    entries = loaded.items() if isinstance(loaded, Mapping) else [(None, loaded)]
    for key, value in entries:
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CorruptFileError(
                f"{str(path)!r} is no state dict: expected tensors under names, found {key!r}, a "
                f"{type(value).__name__}. Save model.state_dict() alone."
            )
    return dict(loaded)


def find_checkpoints(folder: PathLike) -> dict[int, Path]:
    """Find the adapters of one task: files like `70.safetensors`, or folders like `checkpoint-70` with one in each.

    Args:
        folder: The task's folder.

    Returns:
        Training step -> file, in rising order. The step is the last number in the name; where names lack one, or two
        have the same, files count from 1 in natural order.
    """
    found: dict[str, Path] = {}
    for path in Path(folder).iterdir():
        if path.is_file() and path.suffix in _SUFFIXES:
            found[path.name.removesuffix(path.suffix)] = path
        else:
            inside = [path / name for name in _ADAPTER_NAMES if (path / name).is_file()]
            if inside:
                found[path.name] = inside[0]
    names = sorted(found, key=natural_key)
    steps = [int((re.findall(r"\d+", name) or [0])[-1]) for name in names]
    if len(set(steps)) < len(steps) or 0 in steps:
        steps = list(range(1, len(names) + 1))
    return {step: found[name] for step, name in sorted(zip(steps, names, strict=True))}


def read_published_prompts(path: PathLike) -> list[str]:
    """Read the prompts of one of the release's data files, in order and without their answers.

    Args:
        path: A JSON list of `{"prompt": ...}`, or of `{"conversations": [{"value": ...}, ...]}`, of which the first
            message is the prompt.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it is not JSON.
        PromptError: If a row has neither form.
    """
    rows = read_json(path)
    try:
        return [row["prompt"] if "prompt" in row else row["conversations"][0]["value"] for row in rows]
    except (TypeError, KeyError, IndexError) as error:
        raise PromptError(
            f'{str(path)!r} is no list of {{"prompt": ...}} or {{"conversations": [{{"value": ...}}]}} ({error!r}). '
            "Write the task's prompts in one of these forms."
        ) from error
