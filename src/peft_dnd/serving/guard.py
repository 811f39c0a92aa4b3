# SPDX-License-Identifier: Apache-2.0
"""What stands before every endpoint: tokens, bounds on requests and their bodies, the log and the counters."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .json_logs import places
from .limits import ServiceLimits
from .metrics import ServiceMetrics
from .problems import Problem, busy, problem_response
from .tokens import Tokens


_OPEN = "/health/"
_CLIENT = "peft_dnd_client"
_NOTES = "peft_dnd_notes"
# What web servers write into their logs where the client did not wait for the answer.
_GONE = 499

logger = logging.getLogger(__name__)


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Who asks: the owner of the token, without tokens the address."""
    client: str = scope[_CLIENT]
    return client


def note(scope: MutableMapping[str, Any], **facts: Any) -> None:
    """Say more of a request than the log would: nothing that a client wrote."""
    scope.setdefault(_NOTES, {}).update(facts)


class Guard:
    """Lets a request through to the endpoints if it may pass, and notes what became of it.

    It answers 401 without a right token, 429 if too many requests are being worked on, 413 if the body is too large
    and 408 if it comes too slowly. What is under `/health` needs no token, and is never refused.

    Args:
        app: What stands behind it.
        limits: The bounds.
        metrics: The counters.
        tokens: The tokens; none means that anybody may pass.
    """

    def __init__(self, app: ASGIApp, *, limits: ServiceLimits, metrics: ServiceMetrics, tokens: Tokens) -> None:
        self._app, self._limits, self._metrics, self._tokens = app, limits, metrics, tokens
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, answer = time.monotonic(), _Answer(send)
        scope[_CLIENT] = scope["client"][0] if scope.get("client") else "unknown"
        request_id = uuid.uuid4().hex
        answer.headers.append((b"x-request-id", request_id.encode()))
        failure: dict[str, Any] = {}
        try:
            await asyncio.wait_for(self._pass(scope, receive, answer), self._limits.answer_seconds)
        except Problem as problem:
            await self._tell(problem, scope, receive, answer)
        except (TimeoutError, asyncio.TimeoutError):
            await self._tell(Problem(503, "The answer took too long.", {"Retry-After": "1"}), scope, receive, answer)
        except ClientDisconnect:
            answer.status = _GONE
        except Exception as error:
            failure = {"exception": type(error).__name__, "raised_at": places(error.__traceback__)}
            await self._tell(Problem(500, f"A fault of the service, number {request_id}."), scope, receive, answer)
        finally:
            self._note(scope, answer, time.monotonic() - began, request_id, failure)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if scope["path"].startswith(_OPEN):
            await self._app(scope, receive, answer)
            return
        self._admit(scope)
        self._in_work += 1
        self._metrics.in_work.set(self._in_work)
        try:
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), answer)
        finally:
            self._in_work -= 1
            self._metrics.in_work.set(self._in_work)

    def _admit(self, scope: Scope) -> None:
        if self._tokens:
            owner = self._tokens.owner_of(Headers(scope=scope).get("authorization"))
            if owner is None:
                raise Problem(
                    401, "A bearer token is needed: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
                )
            scope[_CLIENT] = owner
        if self._in_work >= self._limits.requests:
            raise busy(f"{self._in_work} requests are being worked on, the most at once. Try again later.", 1)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body, no more of it than may be."""
        most = self._limits.request_bytes
        declared = Headers(scope=scope).get("content-length", "")
        too_large = Problem(413, f"A request's body may have {most} bytes. Send fewer or shorter prompts.")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_large
        body, more = bytearray(), True
        deadline = time.monotonic() + self._limits.body_seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError) as error:
                raise Problem(408, f"The body took longer than {self._limits.body_seconds:g} s.") from error
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            more = message.get("more_body", False)
        return bytes(body)

    async def _tell(self, problem: Problem, scope: Scope, receive: Receive, answer: _Answer) -> None:
        # An answer that has begun cannot be taken back: the server sees that its end is missing, and cuts it off.
        if answer.status is None:
            await problem_response(problem)(scope, receive, answer)

    def _note(self, scope: Scope, answer: _Answer, seconds: float, request_id: str, failure: dict[str, Any]) -> None:
        # Neither the path nor the query as they were sent: clients may write anything there.
        route = getattr(scope.get("route"), "path", "none")
        status = answer.status or 500
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.answered(method, route, status, seconds)
        facts = {
            "request": request_id,
            "client": client_of(scope),
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **scope.get(_NOTES, {}),
            **failure,
        }
        level = logging.ERROR if status >= 500 else logging.DEBUG if route.startswith(_OPEN) else logging.INFO
        logger.log(level, "request", extra={"facts": facts})


_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}


class _Answer:
    """Passes an answer on, with headers of our own, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.headers: list[tuple[bytes, bytes]] = [(b"x-content-type-options", b"nosniff")]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self.headers]}
        await self._send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives the body that was read, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
