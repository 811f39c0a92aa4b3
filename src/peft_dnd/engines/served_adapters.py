# SPDX-License-Identifier: Apache-2.0
"""Adapters from a `peft-dnd serve` over HTTP, kept in a folder of this machine."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..errors import CorruptFileError, EngineError
from ..storage.files import PathLike, staged_directory
from .kept_adapters import KeptAdapters, parse_name


# Generating may have to wait for others in the service's queue.
_TIMEOUT_SECONDS = 300.0
_CHUNK = 1 << 20
_MOST_JSON = 1 << 20
# Several times the adapter of the largest rank that engines take on a model of 70B parameters.
_MOST_BYTES = {ADAPTER_CONFIG_NAME: _MOST_JSON, ADAPTER_WEIGHTS_NAME: 32 << 30}
_NOT_THERE = (404, 410)


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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise EngineError(f"The service's URL must be like 'http://host:8000', got {url!r}.")
        if parts.username or parts.password:
            raise EngineError("The service's URL holds a user or password. Give the token apart from it.")
        self._url, self._token = url.rstrip("/"), token
        self._kept = KeptAdapters(cache)
        # The token must not go wherever the service, or who is in between, would like it to go.
        self._opener = build_opener(_NoRedirects)

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
        body = json.dumps({"task": task}).encode()
        with self._asked("/v1/adapters", body) as response:
            if response is None:
                return None
            facts = _json_of(response)
        found = parse_name(f"dnd:{facts.get('id')}")
        if found is None or found.adapter_id is None:
            raise EngineError(f"The service at {self._url!r} gave no id for {task!r}, but {facts.get('id')!r:.80}.")
        return found.adapter_id

    def _fetch(self, adapter_id: str) -> Path | None:
        with self._asked(f"/v1/adapters/{adapter_id}") as response:
            if response is None:
                return None
            place = self._kept.place_of(adapter_id)
            try:
                with staged_directory(place) as staged:
                    _unpack(response, staged)
                    self._kept.make_servable(staged)
            except (tarfile.TarError, CorruptFileError, FileNotFoundError, HTTPException) as error:
                raise EngineError(
                    f"The service at {self._url!r} sent no whole adapter for {adapter_id!r} ({error}). Ask again, and "
                    "look whether it and this library are of one version."
                ) from error
        return place

    @contextmanager
    def _asked(self, path: str, body: bytes | None = None) -> Iterator[HTTPResponse | None]:
        headers = {"Accept": "*/*"} if body is None else {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = Request(self._url + path, data=body, headers=headers)
        try:
            response = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        except HTTPError as error:
            with error:
                if error.code in _NOT_THERE:
                    response = None
                else:
                    raise self._refused(error) from error
        except (URLError, OSError, HTTPException) as error:
            raise self._unreachable(error) from error
        if response is None:
            yield None
            return
        with response:
            try:
                yield response
            except (TimeoutError, ConnectionError) as error:
                raise self._unreachable(error) from error

    def _refused(self, error: HTTPError) -> EngineError:
        try:
            detail = json.loads(error.read(_MOST_JSON)).get("detail")
        except (OSError, ValueError, AttributeError, HTTPException):
            detail = None
        said = f": {detail!s:.300}" if detail else ""
        mend = " Check PEFT_DND_SERVICE_TOKEN." if error.code in (401, 403) else ""
        return EngineError(f"The service at {self._url!r} answered {error.code} {error.reason}{said}.{mend}")

    def _unreachable(self, error: Exception) -> EngineError:
        reason = getattr(error, "reason", error)
        return EngineError(
            f"The service at {self._url!r} cannot be reached ({reason}). Check PEFT_DND_SERVICE_URL, and whether "
            "`peft-dnd serve` runs there."
        )


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer itself becomes the error."""


def _json_of(response: HTTPResponse) -> dict[str, Any]:
    try:
        facts = json.loads(response.read(_MOST_JSON))
    except (ValueError, RecursionError, HTTPException) as error:
        raise EngineError(f"The service's answer is no JSON ({error}). Is it `peft-dnd serve`?") from error
    if not isinstance(facts, dict):
        raise EngineError(f"The service's answer is no JSON object, but {facts!r:.80}. Is it `peft-dnd serve`?")
    return facts


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
