# SPDX-License-Identifier: Apache-2.0
"""Asking a server over HTTP: with a token that goes nowhere else, and errors that say what the server said."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import EngineError


# Generating may have to wait for others in the server's queue.
_TIMEOUT_SECONDS = 300.0
_MOST_JSON = 1 << 20


class HttpClient:
    """Asks one server.

    Args:
        url: Where it is, `http://host:port`.
        token: Bearer token, if it wants one.
        what: What errors call it.
        mend: What they say to do if it cannot be reached, or is not what it should be.

    Raises:
        EngineError: If the URL is none of HTTP.
    """

    def __init__(self, url: str, token: str | None, *, what: str, mend: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise EngineError(f"{what}'s URL must be like 'http://host:8000', got {url!r}.")
        if parts.username or parts.password:
            raise EngineError(f"{what}'s URL holds a user or password. Give the token apart from it.")
        self._url, self._token = url.rstrip("/"), token
        self._mend, self.name = mend, f"{what} at {self._url!r}"
        self._opener = build_opener(_NoRedirects)

    @contextmanager
    def ask(
        self, path: str, body: Any = None, *, not_there: Collection[int] = (404, 410)
    ) -> Iterator[HTTPResponse | None]:
        """Ask for something, or with a body send that as JSON.

        Args:
            path: What to ask for.
            body: What to send.
            not_there: Statuses with which this server says that there is no such thing.

        Yields:
            The answer, to be read; `None` if there is no such thing.

        Raises:
            EngineError: If the server cannot be reached, breaks off, or answers with another error.
        """
        headers = {"Accept": "*/*"} if body is None else {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            response = self._opener.open(Request(self._url + path, data, headers), timeout=_TIMEOUT_SECONDS)
        except HTTPError as error:
            with error:
                if error.code not in not_there:
                    raise self._refused(error) from error
            yield None
            return
        except (URLError, OSError, HTTPException) as error:
            raise self._unreachable(error) from error
        with response:
            try:
                yield response
            except (TimeoutError, ConnectionError) as error:
                raise self._unreachable(error) from error

    def facts_in(self, response: HTTPResponse) -> dict[str, Any]:
        """The JSON object that an answer is.

        Raises:
            EngineError: If it is none.
        """
        try:
            facts = json.loads(response.read(_MOST_JSON))
        except (ValueError, RecursionError, HTTPException) as error:
            raise EngineError(f"{self.name} answered what is no JSON ({error}). {self._mend}") from error
        if not isinstance(facts, dict):
            raise EngineError(f"{self.name} answered what is no JSON object, but {facts!r:.80}. {self._mend}")
        return facts

    def _refused(self, error: HTTPError) -> EngineError:
        try:
            facts = json.loads(error.read(_MOST_JSON))
            said = facts.get("error")  # as OpenAI's protocol has it
            detail = facts.get("detail") or facts.get("error_message")
            detail = detail or (said.get("message") if isinstance(said, dict) else said)
        except (OSError, ValueError, AttributeError, RecursionError, HTTPException):
            detail = None
        said = f": {detail!s:.300}" if detail else ""
        mend = " Check the token." if error.code in (401, 403) else ""
        return EngineError(f"{self.name} answered {error.code} {error.reason}{said}.{mend}")

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(f"{self.name} cannot be reached ({getattr(error, 'reason', error)}). {self._mend}")


class _NoRedirects(HTTPRedirectHandler):
    # The token must not go wherever the server, or who is in between, would like it to go.
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer itself becomes the error."""
