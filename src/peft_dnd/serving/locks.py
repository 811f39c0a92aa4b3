# SPDX-License-Identifier: Apache-2.0
"""Locks between processes that end with the process, however it ends, and working folders that are told by them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import portalocker
from portalocker import LockFlags


def locked(path: Path, *, shared: bool = False, wait: bool = False) -> BinaryIO | None:
    """Lock a file; it stays locked until what is returned is closed, or the process has ended.

    Args:
        path: The file. One that is to be locked for oneself alone is made where missing.
        shared: Whether others may hold such a lock at the same time.
        wait: Whether to wait while another holds it.

    Returns:
        The open file; `None` if another holds it, and one does not wait.

    Raises:
        OSError: If the file cannot be opened.
    """
    file: BinaryIO = path.open("rb" if shared else "ab")
    flags = (LockFlags.SHARED if shared else LockFlags.EXCLUSIVE) | (LockFlags(0) if wait else LockFlags.NON_BLOCKING)
    try:
        portalocker.lock(file, flags)
    except portalocker.exceptions.LockException:
        file.close()
        return None
    return file


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within this context no other process, and no other thread, is in one with the same file."""
    file = locked(path, wait=True)
    assert file is not None
    with file:
        yield


class WorkFolder:
    """A folder of this process alone, for what is being written or thrown away.

    Making one removes those whose process has ended without closing its own.

    Args:
        parent: Where the working folders of all processes lie.
        guard: A file that is locked while they are looked through.

    Attributes:
        path: The folder.
    """

    def __init__(self, parent: Path, guard: Path) -> None:
        self.path = parent / uuid.uuid4().hex
        with alone(guard):
            self.removed = sum(_remove_if_left(lock) for lock in parent.glob("*.lock"))
            self._lock = locked(self.path.with_suffix(".lock"))
            self.path.mkdir()

    def new_name(self) -> Path:
        """A path in the folder where nothing is."""
        return self.path / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()


def _remove_if_left(lock: Path) -> bool:
    file = locked(lock)
    if file is None:
        return False
    with file:
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        with suppress(OSError):
            lock.unlink()
    return True
