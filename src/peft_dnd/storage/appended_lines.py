# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines to which long work appends, and from which it goes on after it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import PathLike


def append_lines(path: PathLike, rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = True) -> int:
    """Append rows, a JSON object a line, and have them on the disk; gives how many there were."""
    lines = [json.dumps(dict(row), separators=(",", ":"), ensure_ascii=ensure_ascii) + "\n" for row in rows]
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return len(lines)


def whole_lines(path: PathLike) -> list[bytes]:
    """The lines that earlier work left, none if there is no file; not half a line, which killed work may leave."""
    if not Path(path).is_file():
        return []
    content = Path(path).read_bytes()
    return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]


def take_off_half_line(path: PathLike) -> None:
    """Have a file end after its last whole line, if there is one."""
    if Path(path).is_file():
        content = Path(path).read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)
