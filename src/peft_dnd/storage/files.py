# SPDX-License-Identifier: Apache-2.0
"""Writing and reading files so that a kill or a full disk never leaves a half-written one in a good one's place.

Everything is first written beside its destination, flushed to disk, and then renamed over it, which POSIX and Windows
do in one step.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CorruptFileError, DestinationError, MissingFileError, PeftDndError, SavingError


PathLike = str | os.PathLike[str]
_STAGING_PREFIX = ".peft_dnd_staging_"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What goes wrong in writing and in nothing else: such an error is one of saving, even where it names no file.
_ONLY_IN_WRITING = (*_NO_SPACE, errno.EFBIG, errno.EROFS)
# How safetensors and tokenizers, written in Rust, tell the errno, in new and in old versions.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
_UNTOUCHED = "What was there before is untouched."


@contextmanager
def staged_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well its file replaces `path`, otherwise it vanishes.

    Args:
        path: The destination. Its parent folders are made where missing.

    Raises:
        DestinationError: If `path` names no place, or a file is where a parent folder should be.
        SavingError: If writing fails. What was at `path` is untouched.
    """
    target = _destination(path)
    with _errors_of_saving(target):
        _make_parents(target)
        handle, name = tempfile.mkstemp(prefix=_STAGING_PREFIX, suffix=target.suffix, dir=target.parent)
        os.close(handle)
    staged = Path(name)
    try:
        with errors_of_writing_below(staged, target):
            yield staged
        with _errors_of_saving(target):
            _finish(staged)
            os.replace(staged, target)
    finally:
        with suppress(OSError):  # it must not hide why saving failed
            staged.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: PathLike) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well its files move into `path`, otherwise they vanish.

    A folder that does not exist yet appears in one rename. Into an existing folder the files move one by one, each
    replacing its namesake whole; files there that have no namesake stay.

    Args:
        path: The destination folder.

    Raises:
        DestinationError: If `path` names no place, or a file is where it or a parent folder should be.
        SavingError: If writing fails. Nothing of it is at `path` then, unless the message says so.
    """
    target = _destination(path)
    with _errors_of_saving(target):
        if target.exists() and not target.is_dir():
            raise DestinationError(f"Cannot save to {str(target)!r}: it is a file. Name a folder, or remove the file.")
        _make_parents(target)
        staged = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=target.parent))
    try:
        with errors_of_writing_below(staged, target):
            yield staged
        with _errors_of_saving(target):
            for file in _files_below(staged):
                _finish(file)
            staged.chmod(0o777 & ~_current_umask())
        if target.exists():
            _move_into(target, staged)
        else:
            with _errors_of_saving(target):
                os.replace(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def errors_of_writing_below(staged: Path, target: Path) -> Iterator[None]:
    """Where the block fails in writing to `staged`, name `target` instead, which is what users know of.

    Whatever else the block raises passes unchanged.

    Raises:
        SavingError: If the block fails in writing.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of_writing_below(staged, error)
        if number is None:
            raise
        raise _saving_error(target, number) from error


def write_text(path: PathLike, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(path: PathLike, data: Any) -> None:
    """Write `data` to `path` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it is not JSON, for instance cut short.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON or no UTF-8; numbers or nesting beyond what Python takes
        raise CorruptFileError(
            f"{str(path)!r} is not readable JSON ({error}). It may have been cut short or edited by hand: "
            "restore it, or write the folder again."
        ) from error


def write_safetensors(
    path: PathLike, tensors: Mapping[str, torch.Tensor], header: tuple[str, str] = ("format", "pt")
) -> None:
    """Write tensors to a safetensors file that stock PEFT and transformers read, whole or not at all.

    Args:
        path: The file.
        tensors: Name -> tensor.
        header: The one text in the file's header, and its name. Of several, safetensors writes the order as it comes,
            and the same tensors are to give the same bytes.
    """
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with staged_file(path) as staged:
        save_file(contiguous, staged, metadata=dict([header]))


def read_safetensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file to the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If the file is truncated or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def read_safetensors_metadata(path: PathLike) -> dict[str, str]:
    """Read the texts in a safetensors file's header.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If the file is truncated or no safetensors file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_safetensors_shapes(path: PathLike) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a safetensors file from its header, without its data.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If the file is truncated or no safetensors file.
    """
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)


@contextmanager
def _opened(path: PathLike) -> Iterator[Any]:
    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CorruptFileError(
            f"{str(path)!r} is not a readable safetensors file ({error}). It may have been cut short in writing or "
            "copying: restore it, or write it again."
        ) from error


def _destination(path: PathLike) -> Path:
    # An empty name would be the current folder, which nobody means by it.
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise DestinationError(f"What is saved needs a place, named by a string or a path; got {path!r}.")
    return Path(path)


def _make_parents(target: Path) -> None:
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise DestinationError(
                f"Cannot save to {str(target)!r}: {str(parent)!r} is a file. Name another folder, or remove the file."
            )
    target.parent.mkdir(parents=True, exist_ok=True)


def _move_into(target: Path, staged: Path) -> None:
    with _errors_of_saving(target, left="Some of its files may be new by now and others old: save again."):
        for file in _files_below(staged):
            destination = target / file.relative_to(staged)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)


@contextmanager
def _errors_of_saving(target: Path, left: str = _UNTOUCHED) -> Iterator[None]:
    """For what this file does itself: there any `OSError` is one of saving."""
    try:
        yield
    except PeftDndError:
        raise
    except OSError as error:
        raise _saving_error(target, error.errno or errno.EIO, left) from error


def _errno_of_writing_below(staged: Path, error: Exception) -> int | None:
    if isinstance(error, OSError):
        if error.filename is None:
            return error.errno if error.errno in _ONLY_IN_WRITING else None
        return error.errno if staged.name in str(error.filename) else None
    found = _RUST_ERROR.search(str(error))
    number = int(found[1] or found[2]) if found else None
    return number if number in _ONLY_IN_WRITING else None


def _saving_error(target: Path, number: int, left: str = _UNTOUCHED) -> SavingError:
    reason = os.strerror(number)
    error = SavingError(
        f"Cannot save to {str(target)!r}: writing failed with {reason!r} (errno {number}). {left} {_mend(number)}, or "
        "save elsewhere."
    )
    error.errno, error.strerror, error.filename = number, reason, str(target)
    return error


def _mend(number: int) -> str:
    if number in _NO_SPACE:
        return "Free some space"
    return "Raise the limit on a file's size" if number == errno.EFBIG else "Make it a place that you can write to"


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _finish(path: Path) -> None:
    """Flush a file to disk, and open it to others: mkstemp and safetensors make files for their owner alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_current_umask())


def _current_umask() -> int:
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    return umask
