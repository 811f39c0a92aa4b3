# SPDX-License-Identifier: Apache-2.0
"""What a page keeps of its visitors, and no more than so much: the adapters they made, the files they dropped."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from threading import Lock
from typing import Any

from .page_generator import MadeAdapter


Message = MutableMapping[str, Any]
_UPLOAD = "/upload"


class KeptAdapters:
    """Adapters under names that nobody can guess. Beyond so many, the one that was not used for longest goes.

    Args:
        folder: Where each gets a folder of its name.
        most: How many are kept.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most
        self._made: OrderedDict[str, MadeAdapter] = OrderedDict()
        self._lock = Lock()

    def new_folder(self) -> Path:
        """A folder for one more adapter, that is there and empty; its name is to be the adapter's."""
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder

    def keep(self, made: MadeAdapter) -> str:
        """Keep an adapter that was made in a folder of [`new_folder`].

        Returns:
            Its name.
        """
        with self._lock:
            self._made[made.folder.name] = made
            gone = [self._made.popitem(last=False)[1] for _ in range(len(self._made) - self._most)]
        for one in gone:
            one.discard()
        return made.folder.name

    def get(self, name: str | None) -> MadeAdapter | None:
        """An adapter by its name; `None` if it is not kept."""
        with self._lock:
            if name is None or name not in self._made:
                return None
            self._made.move_to_end(name)
            return self._made[name]

    def drop(self, name: str | None) -> None:
        """Remove an adapter and its files, if it is kept."""
        with self._lock:
            made = self._made.pop(name, None) if name is not None else None
        if made is not None:
            made.discard()


class BoundedUploads:
    """ASGI middleware that takes no further upload while so many files lie in a folder. Gradio bounds their size.

    Args:
        app: The application behind it.
        folder: The folder of uploads. Old ones are removed, what Gradio leaves of refused ones as well.
        apart: A folder in it that is none of them.
        most: How many files.
        seconds: How old they may get.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], *, folder: Path, apart: Path, most: int, seconds: float
    ) -> None:
        self._app = app
        self._folder = folder
        self._apart = apart
        self._most = most
        self._seconds = seconds

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer a request, or pass it on."""
        is_upload = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(_UPLOAD)
        if not is_upload or self._count() < self._most:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 429, "headers": [(b"content-type", b"application/json")]})
        text = b'{"detail": "Too many files are kept here at present. Paste the prompts, or come back in an hour."}'
        await send({"type": "http.response.body", "body": text})

    def _count(self) -> int:
        oldest, count = time.time() - self._seconds, 0
        for path in self._folder.rglob("*"):
            try:
                if self._apart in path.parents or not path.is_file():
                    continue
                if path.stat().st_mtime >= oldest:
                    count += 1
                else:
                    path.unlink()
            except FileNotFoundError:  # Gradio was quicker
                continue
        return count
