# SPDX-License-Identifier: Apache-2.0
"""Adapters from a `peft-dnd serve` over HTTP, kept in a folder of this machine."""

from __future__ import annotations

import tarfile
from http.client import HTTPException
from pathlib import Path
from typing import IO

from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..errors import CorruptFileError, EngineError
from ..storage.files import PathLike, staged_directory
from .http_client import HttpClient
from .kept_adapters import KeptAdapters, parse_name


_CHUNK = 1 << 20
# Several times the adapter of the largest rank that engines take on a model of 70B parameters.
_MOST_BYTES = {ADAPTER_CONFIG_NAME: 1 << 20, ADAPTER_WEIGHTS_NAME: 32 << 30}
_MEND = "Check PEFT_DND_SERVICE_URL, and whether `peft-dnd serve` runs there."


class ServedAdapters:
    """The adapters of a service, by id or by the name of a task.

    Args:
        url: Where the service is, `http://host:port`.
        token: Bearer token, if it wants one.
        cache: Folder to keep adapters in; it is made where missing. What is in it is not asked for again.

    Raises:
        EngineError: If the URL is none of HTTP.
    """

    def __init__(self, url: str, token: str | None, cache: PathLike) -> None:
        self._client = HttpClient(url, token, what="The service", mend=_MEND)
        self._kept = KeptAdapters(cache)

    def find(self, name: str) -> Path | None:
        """The folder of an adapter, fetched where it is not here yet.

        Args:
            name: `dnd:` and an id; or the name of a task, with `dnd:` before it or without.

        Returns:
            The folder; `None` if the service knows no such adapter.

        Raises:
            EngineError: If the service cannot be reached, refuses the token, fails, or sends what is no adapter.
        """
        parsed = parse_name(name)
        if parsed is None:
            return None
        adapter_id = parsed.adapter_id or self._id_of_task(parsed.task)
        if adapter_id is None:
            return None
        return self._kept.folder_of(adapter_id) or self._fetch(adapter_id)

    def _id_of_task(self, task: str) -> str | None:
        with self._client.ask("/v1/adapters", {"task": task}) as response:
            if response is None:
                return None
            facts = self._client.facts_in(response)
        found = parse_name(f"dnd:{facts.get('id')}")
        if found is None or found.adapter_id is None:
            raise EngineError(f"{self._client.name} gave no id for {task!r}, but {facts.get('id')!r:.80}. {_MEND}")
        return found.adapter_id

    def _fetch(self, adapter_id: str) -> Path | None:
        with self._client.ask(f"/v1/adapters/{adapter_id}") as response:
            if response is None:
                return None
            place = self._kept.place_of(adapter_id)
            try:
                with staged_directory(place) as staged:
                    _unpack(response, staged)
                    self._kept.make_servable(staged)
            except (tarfile.TarError, CorruptFileError, FileNotFoundError, HTTPException) as error:
                raise EngineError(
                    f"{self._client.name} sent no whole adapter for {adapter_id!r} ({error}). Ask again, and "
                    "look whether it and this library are of one version."
                ) from error
        return place


def _unpack(response: IO[bytes], folder: Path) -> None:
    """Take an adapter's two files out of a tar as it arrives, under these names and no other."""
    # An uncompressed stream: nothing in it can be larger than what is sent.
    with tarfile.open(fileobj=response, mode="r|") as archive:
        for member in archive:
            most = _MOST_BYTES.get(member.name)
            file = archive.extractfile(member) if most is not None and member.isreg() else None
            if most is None or file is None:
                continue
            if member.size > most:
                raise CorruptFileError(f"{member.name} would have {member.size} bytes, and may have {most}")
            with (folder / member.name).open("wb") as out:
                while chunk := file.read(_CHUNK):
                    out.write(chunk)
