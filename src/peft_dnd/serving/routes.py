# SPDX-License-Identifier: Apache-2.0
"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from starlette.background import BackgroundTask
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from .archive import file_chunks, tar_chunks, tar_size
from .cache import OpenAdapter
from .generators import ServedGenerator
from .guard import client_of, note
from .messages import (
    AdapterFacts,
    AdapterList,
    FromPrompts,
    FromTask,
    GeneratorFacts,
    GeneratorList,
    Health,
    PolicyFacts,
    TaskFacts,
    TaskList,
    TaskName,
    Wanted,
)
from .problems import Problem, ProblemDetails
from .service import AdapterService, no_adapter


_Result = TypeVar("_Result")
_IDS = "^[0-9a-f]{64}$"
_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def _service(request: Request) -> AdapterService:
    service: AdapterService = request.app.state.service
    return service


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ProblemDetails} for status in statuses}


Service = Annotated[AdapterService, Depends(_service)]
AdapterId = Annotated[str, Path(pattern=_IDS, description="Id of the adapter.")]
Name = Annotated[TaskName, Path(description="Name of the task.")]
FileName = Literal["adapter_config.json", "adapter_model.safetensors", "README.md", "peft_dnd_provenance.json"]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MAKING = _problems(403, 409, 422, 429, 507)

v1 = APIRouter(prefix="/v1", responses=_problems(400, 401, 408, 413, 422, 429, 500, 503))
health = APIRouter(prefix="/health", tags=["operation"])
operation = APIRouter(tags=["operation"], responses=_problems(401))


@v1.post(
    "/adapters",
    tags=["adapters"],
    status_code=201,
    responses={200: {"model": AdapterFacts, "description": "It was there."}, **_MAKING, **_problems(404, 410)},
)
async def make_adapter(
    wanted: Annotated[Wanted, Body()], request: Request, response: Response, service: Service
) -> AdapterFacts:
    """Make the adapter of some prompts, or of a task that has a name; if it is there, nothing is done."""
    client = client_of(request.scope)
    if isinstance(wanted, FromTask):
        found = service.adapter_of_task(wanted.task, client, wanted.base)
    else:
        found = service.adapter(wanted.source(), client)
    facts, made = await _while_connected(request, found)
    note(request.scope, adapter=facts["id"], generator=facts["generator"], prompts=facts["prompts"], made=made)
    response.status_code = 201 if made else 200
    response.headers["Location"] = f"/v1/adapters/{facts['id']}"
    return AdapterFacts.of(facts)


@v1.get("/adapters", tags=["adapters"])
async def list_adapters(
    service: Service,
    after: Annotated[str | None, Query(pattern=_IDS, description="List those behind this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="The most at once.")] = 100,
) -> AdapterList:
    """List the adapters that are kept, in the order of their ids."""

    def look() -> tuple[list[dict[str, Any]], str | None]:
        names = [name for name in service.cache.names() if after is None or name > after]
        page = names[:limit]
        more = page[-1] if len(names) > limit else None
        return [facts for facts in map(service.cache.peek, page) if facts is not None], more

    found, more = await asyncio.to_thread(look)
    return AdapterList(adapters=[AdapterFacts.of(facts) for facts in found], next=more)


@v1.get(
    "/adapters/{adapter_id}",
    tags=["adapters"],
    response_class=Response,
    responses={
        200: {"content": {"application/x-tar": _BINARY}},
        304: {"description": "You have it."},
        **_problems(404),
    },
)
async def read_adapter(adapter_id: AdapterId, request: Request, service: Service) -> Response:
    """Read an adapter as a tar of its files, which PEFT loads once it is unpacked."""
    return await _sent(
        service, adapter_id, request, "application/x-tar", f"{adapter_id}.tar", lambda opened: opened.facts["files"]
    )


@v1.get("/adapters/{adapter_id}/facts", tags=["adapters"], responses=_problems(404))
async def read_facts(adapter_id: AdapterId, service: Service) -> AdapterFacts:
    """Say what is known of an adapter."""
    facts = await asyncio.to_thread(service.cache.peek, adapter_id)
    if facts is None:
        raise no_adapter(adapter_id)
    return AdapterFacts.of(facts)


@v1.get(
    "/adapters/{adapter_id}/files/{file}",
    tags=["adapters"],
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": _BINARY}},
        304: {"description": "You have it."},
        **_problems(404),
    },
)
async def read_file(adapter_id: AdapterId, file: FileName, request: Request, service: Service) -> Response:
    """Read one file of an adapter."""
    return await _sent(
        service,
        adapter_id,
        request,
        "application/octet-stream",
        file,
        lambda opened: {file: opened.facts["files"][file]},
    )


@v1.delete("/adapters/{adapter_id}", tags=["adapters"], status_code=204, responses=_problems(404))
async def delete_adapter(adapter_id: AdapterId, service: Service) -> None:
    """Delete an adapter. Who is reading it reads it to its end."""
    if not await asyncio.to_thread(service.cache.remove, adapter_id):
        raise no_adapter(adapter_id)


@v1.put(
    "/tasks/{task}",
    tags=["tasks"],
    status_code=201,
    responses={200: {"model": AdapterFacts, "description": "The task had the name before."}, **_MAKING},
)
async def name_task(
    task: Name, wanted: Annotated[FromPrompts, Body()], request: Request, response: Response, service: Service
) -> AdapterFacts:
    """Give a name to a task, and make its adapter if it is not there."""
    facts, new = await _while_connected(request, service.name_task(task, wanted.source(), client_of(request.scope)))
    note(request.scope, adapter=facts["id"], generator=facts["generator"], prompts=facts["prompts"])
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/adapters/{facts['id']}"
    return AdapterFacts.of(facts)


@v1.get("/tasks", tags=["tasks"])
async def list_tasks(service: Service) -> TaskList:
    """List the tasks that have a name."""
    return TaskList(tasks=[TaskFacts.of(task) for task in await asyncio.to_thread(service.tasks.all)])


@v1.get("/tasks/{task}", tags=["tasks"], responses=_problems(404))
async def read_task(task: Name, service: Service) -> TaskFacts:
    """Say what a name stands for."""
    return TaskFacts.of(await service.task(task))


@v1.delete("/tasks/{task}", tags=["tasks"], status_code=204, responses=_problems(404, 409))
async def delete_task(task: Name, service: Service) -> None:
    """Forget a task's name and prompts. Its adapter stays."""
    if not await asyncio.to_thread(service.tasks.remove, task):
        raise Problem(404, f"There is no task {task!r}.")


@v1.get("/generators", tags=["generators"])
async def list_generators(service: Service) -> GeneratorList:
    """List the generators that are served."""
    return GeneratorList(
        generators=[
            GeneratorFacts(
                generator=served.name,
                revision=served.revision,
                base_model=served.generator.config.base_model_name_or_path,
                bases=list(served.generator.config.base_names),
                reads_answers=served.generator.config.condition_text != "prompts",
                tells_out_of_distribution=served.generator.prompt_reference is not None,
                policy=_policy_of(served),
            )
            for served in service.generators.values()
        ]
    )


def _policy_of(served: ServedGenerator) -> PolicyFacts | None:
    policy = served.generator.policy
    if policy is None:
        return None
    gated = None if policy.gate is None else served.is_gated
    return PolicyFacts(parts=list(policy.parts), gate_checked=gated, sha256=policy.sha256)


@health.get("/live")
async def live() -> Health:
    """Say that the process answers."""
    return Health(status="live")


@health.get("/ready", responses=_problems(503))
async def ready(service: Service) -> Health:
    """Say whether adapters can be made: the device takes work, and the cache folder can be written to."""
    await asyncio.to_thread(service.check_ready)
    return Health(status="ready")


@operation.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Service) -> Response:
    """What Prometheus reads."""
    text = await asyncio.to_thread(service.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _sent(
    service: AdapterService, adapter_id: str, request: Request, media_type: str, file_name: str, sizes_of: Any
) -> Response:
    """An answer that streams an open adapter, as a tar or a file of it, and closes it at its end."""
    tag = f'"{adapter_id}"'
    note(request.scope, adapter=adapter_id)
    opened = await service.open(adapter_id)
    headers = {**_FOREVER, "ETag": tag}
    if tag in (part.strip().removeprefix("W/") for part in request.headers.get("If-None-Match", "").split(",")):
        opened.close()
        return Response(status_code=304, headers=headers)
    sizes: dict[str, int] = sizes_of(opened)
    if media_type == "application/x-tar":
        length, chunks = tar_size(sizes), tar_chunks(opened.files, sizes)
    else:
        length, chunks = sizes[file_name], file_chunks(opened.files[file_name])
    headers |= {"Content-Length": str(length), "Content-Disposition": f'attachment; filename="{file_name}"'}
    return StreamingResponse(
        _closing(chunks, opened), media_type=media_type, headers=headers, background=BackgroundTask(opened.close)
    )


async def _closing(chunks: Iterator[bytes], opened: OpenAdapter) -> AsyncIterator[bytes]:
    try:
        async for chunk in iterate_in_threadpool(chunks):
            yield chunk
    finally:
        opened.close()


async def _while_connected(request: Request, wanted: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for something as long as the client does."""
    work = asyncio.create_task(wanted)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait({work, gone})
        if not work.cancelled():
            work.exception()  # otherwise asyncio would log it, message and all


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
