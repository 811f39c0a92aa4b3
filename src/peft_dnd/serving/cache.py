# SPDX-License-Identifier: Apache-2.0
"""The cache folder: adapters under their ids, whole or not there, bounded, and shared between processes.

    adapters/<id>/   an adapter's files and its entry, moved there in one rename; the entry's time is its last use's
    tasks/           names of tasks, see `tasks`
    work/            what is being written or thrown away, a folder a process
    locks/           files that are locked, and empty

Whoever reads an adapter holds a shared lock on its entry, and whoever makes room needs that lock for himself.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..adapters.generated_adapter import PROVENANCE_NAME, GeneratedAdapter
from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..errors import CorruptFileError, DestinationError
from ..storage.cards import CARD_NAME
from ..storage.files import PathLike, read_json, write_json, write_text
from .limits import ServiceLimits
from .locks import WorkFolder, alone, locked
from .problems import Problem, busy


ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, PROVENANCE_NAME)
_ENTRY = "entry.json"
_ID = re.compile(r"[0-9a-f]{64}")
# https://bford.info/cachedir/: back-up programs pass over a folder with this file, and we know it for ours.
_TAG = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# Adapters that peft-dnd serve keeps.\n"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """An adapter in the folder, as making room sees it."""

    name: str
    size: int
    made: float
    used: float


class OpenAdapter:
    """An adapter that is being read: its facts and its open files, which stay whole whatever becomes of the folder.

    Attributes:
        facts: What its entry says.
        files: File name -> the open file.
    """

    def __init__(self, lock: BinaryIO, facts: Mapping[str, Any], files: dict[str, BinaryIO]) -> None:
        self.facts, self.files, self._lock = facts, files, lock

    def close(self) -> None:
        """Read no more."""
        for file in (*self.files.values(), self._lock):
            file.close()


class AdapterCache:
    """Adapters on disk, by id. All methods may be called from any thread, and from many processes at once.

    Args:
        folder: The cache folder; it is made where missing.
        limits: How much it may hold.

    Raises:
        DestinationError: If there is a folder with something else in it.
        OSError: If it cannot be written to.
    """

    def __init__(self, folder: PathLike, limits: ServiceLimits) -> None:
        self.folder, self.limits = Path(folder), limits
        self._claim()
        self._adapters = self._part("adapters")
        self.tasks = self._part("tasks")
        self._locks = self._part("locks")
        self._work = WorkFolder(self._part("work"), self._locks / "work")
        self._immutable: dict[str, tuple[int, int, float]] = {}
        self._memo = threading.Lock()
        if self._work.removed:
            logger.info("removed what %d processes had left half-written", self._work.removed)
        for name in self.names():
            self._remove_unless_whole(name)

    def close(self) -> None:
        """Remove this process's working folder."""
        self._work.close()

    def lock_for(self, name: str) -> Path:
        """The file to lock while the adapter of an id is made. Several ids share one, to have few."""
        return self._locks / f"make-{name[:3]}"

    def facts(self, name: str) -> dict[str, Any] | None:
        """What is known of an adapter, which is thereby used; `None` if it is not there."""
        opened = self.open(name)
        if opened is None:
            return None
        opened.close()
        return dict(opened.facts)

    def open(self, name: str, *, use: bool = True) -> OpenAdapter | None:
        """Open an adapter for reading, so that no process makes room with it; `None` if it is not there.

        One that is too old, or whose files are not of the size that they were written with, is removed instead.

        Args:
            name: Its id.
            use: Whether this counts as a use.
        """
        if not _ID.fullmatch(name):
            return None
        place = self._adapters / name
        try:
            lock = locked(place / _ENTRY, shared=True)
        except OSError:
            if place.is_dir() and not (place / _ENTRY).exists():
                self._throw_away_damaged(name)
            return None
        if lock is None:  # another process is just removing it
            return None
        files: dict[str, BinaryIO] = {}
        try:
            facts = read_json(place / _ENTRY)
            whole = facts["files"].keys() == set(ADAPTER_FILES)
            for file in ADAPTER_FILES if whole else ():
                files[file] = (place / file).open("rb")
                whole &= os.fstat(files[file].fileno()).st_size == facts["files"][file]
            if whole and time.time() - facts["created"] <= self.limits.cache_seconds:
                if use:
                    os.utime(place / _ENTRY)
                return OpenAdapter(lock, facts, files)
        except (OSError, CorruptFileError, KeyError, TypeError, AttributeError):
            whole = False
        for opened in (*files.values(), lock):
            opened.close()
        if whole:  # but too old
            self.remove(name)
        else:
            self._throw_away_damaged(name)
        return None

    def put(self, name: str, adapter: GeneratedAdapter, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Store an adapter, making room for it first.

        Args:
            name: Its id.
            adapter: The adapter.
            facts: What else is to be known of it, in JSON's values.

        Returns:
            All that is known of it.

        Raises:
            SavingError: If writing fails, on a full disk for instance; nothing of it is left then.
            Problem: If it is larger than all that may be kept, or what is kept is all being read.
        """
        staged = self._work.new_name()
        try:
            adapter.save_pretrained(staged)
            sizes = {file: (staged / file).stat().st_size for file in ADAPTER_FILES}
            whole = {**facts, "id": name, "size": sum(sizes.values()), "files": sizes, "created": time.time()}
            write_json(staged / _ENTRY, whole)
            with alone(self._locks / "room"):
                self._make_room(whole["size"])
                _move(staged, self._adapters / name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return whole

    def remove(self, name: str) -> bool:
        """Remove an adapter; whoever reads it reads it to its end. Returns whether it was there."""
        if not _ID.fullmatch(name):
            return False
        thrown = self._work.new_name()
        try:
            os.rename(self._adapters / name, thrown)
        except OSError:
            return False
        shutil.rmtree(thrown, ignore_errors=True)
        return True

    def names(self) -> list[str]:
        """The ids of all adapters, in order."""
        return sorted(name for name in os.listdir(self._adapters) if _ID.fullmatch(name))

    def peek(self, name: str) -> dict[str, Any] | None:
        """What is known of an adapter, without using it; `None` if it is not there, or too old."""
        try:
            facts: dict[str, Any] = read_json(self._adapters / name / _ENTRY)
        except (OSError, CorruptFileError):
            return None
        return facts if time.time() - facts["created"] <= self.limits.cache_seconds else None

    def size(self) -> tuple[int, int]:
        """How many adapters there are, and their bytes."""
        kept = self._kept()
        return len(kept), sum(adapter.size for adapter in kept)

    def remove_old(self) -> int:
        """Remove what is too old and not being read; returns how many that were."""
        with alone(self._locks / "room"):
            return self._remove_old()

    def check_writable(self) -> None:
        """Make sure that something can be written.

        Raises:
            OSError: Otherwise.
        """
        probe = self._work.new_name()
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()

    def _throw_away_damaged(self, name: str) -> None:
        if self.remove(name):
            logger.warning("removed a damaged adapter", extra={"facts": {"adapter": name}})

    def _remove_unless_whole(self, name: str) -> None:
        # Files cannot be cut short by a kill, but by a disk that fails or whoever meddles with the folder.
        opened = self.open(name, use=False)
        if opened is not None:
            opened.close()

    def _remove_old(self) -> int:
        oldest = time.time() - self.limits.cache_seconds
        return sum(self._remove_unread(adapter.name) for adapter in self._kept() if adapter.made < oldest)

    def _make_room(self, size: int) -> None:
        """Remove what is too old, then the least recently used, until one more adapter of this size fits."""
        if size > self.limits.cache_bytes:
            raise Problem(507, f"The adapter has {size} bytes, more than the {self.limits.cache_bytes} that are kept.")
        self._remove_old()
        kept = sorted(self._kept(), key=lambda adapter: adapter.used, reverse=True)
        total = sum(adapter.size for adapter in kept)
        unread = list(kept)
        count = len(kept)
        while total + size > self.limits.cache_bytes or count + 1 > self.limits.cache_adapters:
            if not unread:
                raise busy("All adapters that are kept are being read, so that there is no room for another.", 1)
            least = unread.pop()
            if self._remove_unread(least.name):
                total, count = total - least.size, count - 1

    def _remove_unread(self, name: str) -> bool:
        try:
            lock = locked(self._adapters / name / _ENTRY)
        except OSError:
            return True  # somebody removed it meanwhile
        if lock is None:
            return False
        with lock:
            return self.remove(name)

    def _kept(self) -> list[_Kept]:
        found = []
        for name in self.names():
            try:
                state = os.stat(self._adapters / name / _ENTRY)
                size, made = self._size_and_time(name, state.st_ino)
            except (OSError, CorruptFileError, KeyError, TypeError):
                continue
            found.append(_Kept(name, size, made, state.st_mtime))
        return found

    def _size_and_time(self, name: str, inode: int) -> tuple[int, float]:
        """An adapter never changes, so its entry is read once."""
        with self._memo:
            known = self._immutable.get(name)
        if known is None or known[0] != inode:
            facts = read_json(self._adapters / name / _ENTRY)
            known = (inode, int(facts["size"]), float(facts["created"]))
            with self._memo:
                if len(self._immutable) > 2 * self.limits.cache_adapters:
                    self._immutable.clear()
                self._immutable[name] = known
        return known[1], known[2]

    def _claim(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.folder / _TAG).is_file():
            if any(self.folder.iterdir()):
                raise DestinationError(
                    f"{str(self.folder)!r} is no cache of this service: it has no {_TAG}, and is not empty. Name a "
                    "folder of its own, which need not exist."
                )
            write_text(self.folder / _TAG, _SIGNATURE)

    def _part(self, name: str) -> Path:
        part = self.folder / name
        part.mkdir(mode=0o700, exist_ok=True)
        return part


def _move(staged: Path, place: Path) -> None:
    try:
        os.rename(staged, place)
    except OSError as error:
        # Another process has made the same one meanwhile: it has the same bytes.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
