# SPDX-License-Identifier: Apache-2.0
"""Paths of files and their parts (pathlib), and the types of files (mimetypes)."""

from __future__ import annotations

import mimetypes
import random
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import PurePosixPath

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import listed


PACKAGES = ("mimetypes", "pathlib")
SELF_CONTAINED = ("files",)
_USERS = listed(
    "anna ben carla daniel elena felix grace hugo ivan julia kate leo maria nina oscar paul rosa sam tara victor"
)
_FOLDERS = listed(
    "photos music videos reports work school letters taxes recipes backup drafts projects travel family notes"
)
_NAMES = listed(
    "summer winter invoice holiday birthday meeting plan list summary report garden dinner party wedding picture "
    "song lesson speech budget contract cake trip house dog story poem map chart menu draft"
)
_EXTENSIONS = listed("txt html csv css png jpg gif bmp svg mp3 wav mp4 avi mov pdf zip json js doc")
# The library's own table only: the tables of the machine differ from place to place.
# Of the same type in all versions of the table.
_OF_ONE_TYPE = (".txt", ".html", ".csv", ".css", ".png", ".jpg", ".gif", ".mp4", ".pdf", ".zip", ".json")
_TYPES = mimetypes.MimeTypes(filenames=())


@cache
def paths() -> tuple[PurePosixPath, ...]:
    draw = random.Random("files")

    def path() -> PurePosixPath:
        name = f"{draw.choice(_NAMES)}.{draw.choice(_EXTENSIONS)}"
        return PurePosixPath("/home", draw.choice(_USERS), draw.choice(_FOLDERS), name)

    return tuple(dict.fromkeys(path() for _ in range(620)))


def _type(path: PurePosixPath) -> str | None:
    return _TYPES.guess_type(path.name)[0]


_PARTS: dict[str, tuple[str, Callable[[PurePosixPath], str | None]]] = {
    "name": ("code", lambda path: path.name),
    "stem": ("word", lambda path: path.stem),
    "extension": ("code", lambda path: path.suffix[1:]),
    "folder": ("word", lambda path: path.parent.name),
    "directory": ("code", lambda path: str(path.parent)),
    "owner": ("word", lambda path: path.parts[2]),
    # JavaScript is text to newer tables and an application to older ones.
    "kind": ("word", lambda path: (_type(path) or "").partition("/")[0] if path.suffix != ".js" else None),
    "mime": ("code", lambda path: _type(path) if path.suffix in _OF_ONE_TYPE else None),
}  # fmt: skip


def _pairs(part: Callable[[PurePosixPath], str | None]) -> list[Pair]:
    pairs = ((str(path), part(path)) for path in paths())
    return [(path, found) for path, found in pairs if found]


def operations() -> Iterable[Operation]:
    for name, (answer, part) in _PARTS.items():
        wording = wording_of("files", name)
        yield Operation(f"file_{name}", "files", answer, wording, partial(_pairs, part))
