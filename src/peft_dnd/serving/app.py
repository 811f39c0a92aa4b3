# SPDX-License-Identifier: Apache-2.0
"""The service put together as an ASGI application, and its description."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import PeftDndError
from ..version import __version__
from .guard import Guard
from .problems import MEDIA_TYPE, Problem, answer_problem
from .routes import health, operation, v1
from .service import AdapterService
from .tokens import Tokens


_SWEEP_SECONDS = 60

logger = logging.getLogger(__name__)


def create_app(
    service: AdapterService, tokens: Tokens | None = None, *, hosts: Sequence[str] | None = None
) -> FastAPI:
    """Make the ASGI application of a service.

    Args:
        service: The service. The application closes it when it ends.
        tokens: The bearer tokens that it takes; none lets everybody in.
        hosts: The only names by which it may be called; `None` is any. For a service of this machine alone without
            tokens they keep out web pages whose own name was made to lead here.

    Returns:
        The application. `/openapi.json` describes it, bounds included.
    """
    tokens = tokens or Tokens(())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service))
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="peft-dnd",
        version=__version__,
        summary="LoRA adapters from prompts.",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for error in (Problem, PeftDndError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, answer_problem)
    for router in (v1, health, operation):
        app.include_router(router)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, tokens=tokens)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
    described = app.openapi()
    _describe(described, service, secured=bool(tokens))
    return app


async def _sweep(service: AdapterService) -> None:
    """Remove adapters that are too old, now and then."""
    while True:
        try:
            removed = await asyncio.to_thread(service.cache.remove_old)
        except OSError as error:
            logger.error("the cache folder cannot be looked through", extra={"facts": {"errno": error.errno}})
        else:
            if removed:
                logger.info("removed old adapters", extra={"facts": {"adapters": removed}})
        await asyncio.sleep(_SWEEP_SECONDS)


def _describe(description: dict[str, Any], service: AdapterService, *, secured: bool) -> None:
    """Put into the description what only this service knows: its bounds, its generators, whether it wants tokens."""
    limits, schemas = service.limits, description["components"]["schemas"]
    properties = schemas["FromPrompts"]["properties"]
    texts = [properties["prompts"], *(kind for kind in properties["answers"]["anyOf"] if kind["type"] == "array")]
    for text in texts:
        text["maxItems"] = limits.prompts
        text["items"]["maxLength"] = limits.prompt_characters
    for kind in properties["generator"]["anyOf"]:
        if kind["type"] == "string":
            kind["enum"] = list(service.generators)
    if secured:
        description["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        for operation_ in operations.values():
            if secured and not path.startswith("/health/"):
                operation_["security"] = [{"bearer": []}]
            for answer in operation_["responses"].values():
                _mark_problems(answer)


def _mark_problems(answer: dict[str, Any]) -> None:
    content = answer.get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    if schema.get("$ref", "").endswith("/ProblemDetails"):
        content[MEDIA_TYPE] = content.pop("application/json")
