# SPDX-License-Identifier: Apache-2.0
"""Calling a reader on spoiled files again and again, within bounds of memory and time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_dnd.cli.console import CommandError
from peft_dnd.errors import PeftDndError


# Over what the process has when it begins, and for one file.
_MEMORY, _SECONDS = 3 * 2**30, 60
QUICK = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")), derandomize=False, print_blob=True)


@contextmanager
def bounded() -> Iterator[None]:
    """Within this context the process can take only so much more memory, and so long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {_SECONDS} s for one file")

    before = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(reader: Callable[[Path], Any], folder: Path) -> None:
    """Call a reader on a spoiled folder: anything but a result or an error of ours passes on."""
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(folder)
        except (PeftDndError, CommandError) as error:
            assert len(str(error)) < 5000, "nobody reads that"


def fuzz(
    original: Path,
    reader: Callable[[Path], Any],
    files: Mapping[str, Callable[[bytes], st.SearchStrategy[bytes]]],
    folder: Path,
    how: settings,
) -> None:
    """Copy a good folder, spoil these files of it in the ways that are given, one at a time, and call the reader."""
    shutil.copytree(original, folder)
    reader(folder)  # good as it is
    for name, strategy in files.items():
        _spoil(reader, folder, name, strategy, how)


def _spoil(
    reader: Callable[[Path], Any],
    folder: Path,
    name: str,
    strategy: Callable[[bytes], st.SearchStrategy[bytes]],
    how: settings,
) -> None:
    good = (folder / name).read_bytes()

    @how
    @given(strategy(good))
    def spoil(content: bytes) -> None:
        (folder / name).write_bytes(content)
        read(reader, folder)

    spoil()
    (folder / name).write_bytes(good)
