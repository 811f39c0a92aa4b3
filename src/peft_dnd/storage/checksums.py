# SPDX-License-Identifier: Apache-2.0
"""Checksums of a model's folder, which find the damage that names and shapes cannot show.

A flipped byte, two tensors of one shape exchanged, a scale set to zero: all of it loads. So checksums of the tensors,
of the other safetensors files and of the settings that belong to the weights stand beside them, in `checksums.json`.
They tell damage, not forgery: whoever edits a folder on purpose can write them anew.

All bytes have to be read, and of what is in memory already little else may be done, lest it take longer than loading
it. XXH3 takes no longer than reading does (https://xxhash.com); it is no cryptographic hash, and need not be one.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..errors import CorruptFileError, FormatVersionError
from .files import read_json, write_json
from .stored_weights import StoredTensor, stored_tensors


CHECKSUMS_NAME = "checksums.json"
FORMAT_VERSION = 1
ALGORITHM = "xxh3_64"

_MOST_THREADS = 4

# What the system says of a folder's files: device, number, size and times of change of each.
_State = frozenset[tuple[str, int, int, int, int, int]]
# A file may change twice within one tick of the system's clock, so that nothing tells. Older ones can be told.
_SETTLED_NANOSECONDS = 2 * 10**9
_FOUND_ALIKE: set[_State] = set()


@dataclass(frozen=True)
class Checksums:
    """What a folder's parts were when it was saved: hexadecimal digits for each.

    Attributes:
        tensors: The model's tensors, whichever file they lie in: of type, shape and bytes.
        files: Other files with weights, by their path in the folder: of all bytes.
        settings: What of the configuration belongs to the weights: of each value as JSON.
    """

    tensors: Mapping[str, str]
    files: Mapping[str, str]
    settings: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path, files: Iterable[str], settings: Mapping[str, Any]) -> Checksums:
        """Take the checksums of a folder as it is.

        Args:
            folder: The folder.
            files: Which other files with weights there are, by their path in the folder.
            settings: What of its configuration belongs to the weights.

        Raises:
            FileNotFoundError: If there are no weights in safetensors format, or a shard is missing.
            CorruptFileError: If a file is cut short or is no safetensors file.
        """
        with _Workers() as workers:
            tensors = workers.start_on_tensors(stored_tensors(folder))
            others = {name: workers.start(file_checksum, folder / name) for name in sorted(files)}
            return cls(
                tensors=dict(sorted(workers.results(tensors).items())),
                files={name: found.result() for name, found in others.items()},
                settings=setting_checksums(settings),
            )

    @classmethod
    def read(cls, folder: Path) -> Checksums | None:
        """Read a folder's checksums; `None` if it has none, as those of earlier versions.

        Raises:
            CorruptFileError: If the file is not what [`write`] writes.
            FormatVersionError: If it is of a newer format, or the checksums are of another kind.
        """
        path = folder / CHECKSUMS_NAME
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            version = content["format_version"]
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise FormatVersionError(
                    f"{str(path)!r} is of format version {version}; this version of peft_dnd reads up to "
                    f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-dnd"
                )
            parts = {part: dict(content[part]) for part in ("tensors", "files", "settings")}
            if content["algorithm"] != ALGORITHM:
                raise FormatVersionError(
                    f"{str(path)!r} has checksums by {content['algorithm']!r:.40}; this version of peft_dnd compares "
                    f"{ALGORITHM!r}. If another version of it saved the folder, and you trust it to be whole, take "
                    "them anew: peft_dnd.generator.renew_checksums, or peft-dnd renew-checksums"
                )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatVersionError):
                raise
            raise CorruptFileError(
                f"{str(path)!r} does not have the form of a folder's checksums ({error!r}). It was damaged or edited: "
                "fetch the generator again, or write it anew with peft_dnd.generator.renew_checksums."
            ) from error
        return cls(**parts)

    def write(self, folder: Path) -> Path:
        """Write them into a folder, whole or not at all."""
        path = folder / CHECKSUMS_NAME
        write_json(path, {"format_version": FORMAT_VERSION, "algorithm": ALGORITHM, **asdict(self)})
        return path

    @contextmanager
    def tensors_compared(self, folder: Path) -> Iterator[list[str]]:
        """Compare a folder's tensors with these checksums, in threads of their own while the block runs.

        What is missing the block has to find, and an error of its own comes first. What this process compared before
        and found alike is not read again as long as the system says that its files are the same.

        Args:
            folder: The folder.

        Yields:
            A list that holds, when the context has ended, what differs, in words; empty if nothing does.

        Raises:
            FileNotFoundError: As in [`of`].
            CorruptFileError: As there.
        """
        differing: list[str] = []
        state = _state_of_files(folder)
        if state in _FOUND_ALIKE:
            yield differing
            return
        with _Workers() as workers:
            listing = workers.start(self._begun, folder, workers)
            yield differing
            stored, found = listing.result()
            for name, checksum in workers.results(found).items():
                if checksum != self.tensors.get(name):
                    differing.append(_in_words(name, stored[name]))
        if not differing and state is not None and state == _state_of_files(folder):
            _FOUND_ALIKE.add(state)

    def _begun(self, folder: Path, workers: _Workers) -> tuple[dict[str, StoredTensor], list[Future[dict[str, str]]]]:
        stored = stored_tensors(folder)
        return stored, workers.start_on_tensors(stored)

    def file_differences(self, folder: Path, start: str = "") -> list[str]:
        """Which of the other files differ, in words: of those that are there and whose path begins with `start`."""
        paths = {name: folder / name for name in self.files if name.startswith(start)}
        return [
            f"the file {name!r}"
            for name, path in paths.items()
            if path.is_file() and file_checksum(path) != self.files[name]
        ]

    def setting_differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Which settings differ, in words."""
        found = setting_checksums(settings)
        names = sorted(found.keys() | self.settings.keys())
        return [f"the setting {name!r}" for name in names if found.get(name) != self.settings.get(name)]

    def running(self, name: str, stored: StoredTensor, on_difference: Callable[[str], Any]) -> RunningChecksum:
        """The checksum of a tensor that is going to be read by slices; see [`RunningChecksum`]."""
        return RunningChecksum(name, stored, self.tensors.get(name, ""), on_difference)


class RunningChecksum:
    """The checksum of a stored tensor that is read by slices of its first axis, compared when all have come by.

    Args:
        name: The tensor's name.
        stored: The tensor.
        expected: What its checksum must be.
        on_difference: Called with what differs, in words, if it is another.
    """

    def __init__(self, name: str, stored: StoredTensor, expected: str, on_difference: Callable[[str], Any]) -> None:
        self._name, self._stored, self._expected, self._on_difference = name, stored, expected, on_difference
        self._sum, self._next_row = begun_on(stored), 0

    def take(self, start: int, rows: torch.Tensor) -> None:
        """Take note of rows that were read, from `start` on. Rows that came by before count once."""
        stop = start + len(rows)
        if not start <= self._next_row < stop:
            return
        new = rows[self._next_row - start :].contiguous().view(-1).view(torch.uint8)
        self._sum.update(new.numpy().data)
        self._next_row = stop
        if stop == (self._stored.shape or (1,))[0] and self._sum.hexdigest() != self._expected:
            self._on_difference(_in_words(self._name, self._stored))


class _Workers:
    """A few threads, which end with the context, and drop what waits if it ends in an error."""

    def __enter__(self) -> _Workers:
        self._count = min(_MOST_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._count, "peft_dnd_checksums")
        self.start = self._pool.submit
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def start_on_tensors(self, stored: Mapping[str, StoredTensor]) -> list[Future[dict[str, str]]]:
        """Begin to take checksums, each thread of its share of the bytes."""
        largest_first = sorted(stored.items(), key=lambda item: item[1].num_bytes, reverse=True)
        shares = [dict(largest_first[thread :: self._count]) for thread in range(self._count)]
        return [self.start(tensor_checksums, share) for share in shares if share]

    @staticmethod
    def results(started: list[Future[dict[str, str]]]) -> dict[str, str]:
        """What they are, by name."""
        return {name: checksum for share in started for name, checksum in share.result().items()}


def tensor_checksums(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Checksums of stored tensors: of each one's type and shape, as text, then its bytes."""
    found = {}
    with ExitStack() as open_files:
        maps: dict[Path, memoryview] = {}
        for name, tensor in stored.items():
            if tensor.path not in maps:
                maps[tensor.path] = open_files.enter_context(mapped(tensor.path))
            running = begun_on(tensor)
            with maps[tensor.path][tensor.offset : tensor.offset + tensor.num_bytes] as part:
                running.update(part)
            found[name] = running.hexdigest()
    return found


def _state_of_files(folder: Path) -> _State | None:
    """What would be another after any change of a folder's weights or checksums; `None` if that cannot be told yet."""
    found = []
    for path in (folder / CHECKSUMS_NAME, *folder.glob("model*.safetensors*")):
        stat = path.stat()
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SETTLED_NANOSECONDS:
            return None
        found.append((str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return frozenset(found)


def _in_words(name: str, stored: StoredTensor) -> str:
    return f"the tensor {name!r} in {stored.path.name!r}"


def begun_on(tensor: StoredTensor) -> xxhash.xxh3_64:
    """What a tensor's checksum begins with: its type and shape."""
    return xxhash.xxh3_64(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode())


def file_checksum(path: Path) -> str:
    """The checksum of a whole file."""
    with mapped(path) as view:
        return xxhash.xxh3_64_hexdigest(view)


def setting_checksums(settings: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of each value, as JSON with sorted keys."""
    return {
        name: xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode()) for name, value in settings.items()
    }


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes, read as they are asked for."""
    if not path.stat().st_size:  # which cannot be mapped
        yield memoryview(b"")
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        yield view
