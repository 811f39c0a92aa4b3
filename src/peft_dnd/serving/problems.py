# SPDX-License-Identifier: Apache-2.0
"""What a client is told when it does not get what it asked for: problem details, as RFC 9457 has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import PeftDndError, PolicyError, SavingError


MEDIA_TYPE = "application/problem+json"


class ProblemPart(BaseModel):
    """One thing that is wrong with a request."""

    where: str = Field(description="Where in the request, for instance `body.prompts.3`.")
    what: str = Field(description="What is wrong there.")


class ProblemDetails(BaseModel):
    """Why there is no other answer, as RFC 9457 has it."""

    type: str = Field(default="about:blank", description="Always `about:blank`: the status says which kind it is.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.", ge=400, le=599)
    detail: str = Field(description="What is wrong, and the mend.")
    reason: str | None = Field(default=None, description="In one word, why the generator's policy refuses.")
    errors: list[ProblemPart] | None = Field(default=None, description="Each thing that is wrong with the request.")


class Problem(Exception):
    """An answer that is a problem's details.

    Args:
        status: The HTTP status.
        detail: What is wrong, and the mend; it may reach any client, and no log.
        headers: Headers beside.
        reason: Where the generator's policy refuses: why, in one word.
    """

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, *, reason: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.reason = status, detail, dict(headers or {}), reason


def busy(detail: str, seconds: float) -> Problem:
    """A 429 that says after how many seconds to try again."""
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, detail, {"Retry-After": str(max(1, round(seconds)))})


def problem_response(problem: Problem, errors: list[dict[str, str]] | None = None) -> JSONResponse:
    """The answer that tells a client of a problem."""
    details = ProblemDetails(
        title=HTTPStatus(problem.status).phrase,
        status=problem.status,
        detail=printable(problem.detail),
        reason=problem.reason,
        errors=None if errors is None else [ProblemPart(**error) for error in errors],
    )
    return JSONResponse(
        jsonable_encoder(details, exclude_none=True), problem.status, headers=problem.headers, media_type=MEDIA_TYPE
    )


def of_library_error(error: PeftDndError) -> Problem:
    """What an error of the library means to a client: its request is at fault, but for a disk that is full."""
    if isinstance(error, SavingError):
        return Problem(HTTPStatus.INSUFFICIENT_STORAGE, "The adapter cannot be stored; the operator's log says why.")
    if isinstance(error, PolicyError):
        return Problem(HTTPStatus.FORBIDDEN, str(error), reason=error.reason)
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))


async def answer_problem(request: Request, error: Exception) -> JSONResponse:
    """Answer a [`Problem`], an error of the library, or one of the framework."""
    if isinstance(error, Problem):
        return problem_response(error)
    if isinstance(error, PeftDndError):
        return problem_response(of_library_error(error))
    if isinstance(error, RequestValidationError):
        return problem_response(
            Problem(HTTPStatus.UNPROCESSABLE_ENTITY, _what_is_wrong(request, error)),
            [_part(found) for found in error.errors()[:20]],
        )
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods_allowed(request))
    return problem_response(Problem(error.status_code, str(error.detail), headers))


def _what_is_wrong(request: Request, error: RequestValidationError) -> str:
    sent = request.headers.get("content-type")
    if any(found["loc"][:1] == ("body",) for found in error.errors()) and not _says_json(sent):
        came = "without that header" if sent is None else f"as {sent:.80}"
        return f"The body must be a JSON object, sent with the header Content-Type: application/json; it came {came}."
    return "The request is not of the form that it must have; see errors."


def _says_json(content_type: str | None) -> bool:
    media = (content_type or "").partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


def _methods_allowed(request: Request) -> list[str]:
    """All methods of a path; the framework names those of the first endpoint there alone."""
    description = request.app.openapi()["paths"]
    matching = [
        operations
        for path, operations in description.items()
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), request.url.path)
    ]
    return sorted({method.upper() for operations in matching for method in operations})


def printable(text: str) -> str:
    """The text without lone surrogates, which no answer could be encoded with."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _part(found: Mapping[str, Any]) -> dict[str, str]:
    # Never what was given: it is the prompts, and may be long.
    where = ".".join(printable(str(part))[:100] for part in found["loc"])
    return {"where": where, "what": printable(str(found["msg"]))}
