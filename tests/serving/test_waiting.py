# SPDX-License-Identifier: Apache-2.0
"""Many at once: one adapter for all who want it, turns by client, too many told when to come again, and who leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.constants import TASK_PROMPTS

from peft_dnd.serving import ServedGenerator
from peft_dnd.serving.device_queue import DeviceQueue
from peft_dnd.serving.problems import Problem


PROMPTS = TASK_PROMPTS["law"]


class Gate:
    """Holds the device until it is opened, and counts what came to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.begun = threading.Event(), []
        original = ServedGenerator.generate

        def generate(served: ServedGenerator, source: object) -> object:
            self.begun.append(source.seed)
            assert self.opened.wait(30)
            return original(served, source)

        monkeypatch.setattr(ServedGenerator, "generate", generate)

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.begun) >= count)


def until(true: object) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def measured(client: TestClient, name: str) -> float | None:
    return client.app.state.service.metrics.registry.get_sample_value(name)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def test_all_who_want_the_same_wait_for_one(serve, gate: Gate) -> None:
    client = serve()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS}) for _ in range(8)]
        gate.wait_for(1)
        until(lambda: measured(client, "peft_dnd_requests_in_work") == 8)
        gate.opened.set()
        answers = [answer.result() for answer in asked]
    assert {answer.status_code for answer in answers} == {201} and len({answer.text for answer in answers}) == 1
    assert gate.begun == [0]


def test_too_many_are_told_when_to_come_again(serve, gate: Gate) -> None:
    client = serve(requests=4, queue=3, queue_per_client=2)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": 0})]
        gate.wait_for(1)
        for seed in (1, 2):
            asked.append(pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": seed}))
            until(lambda seed=seed: measured(client, "peft_dnd_adapters_waiting") == seed)
        beyond = client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": 3})
        assert beyond.status_code == 429 and "2 of them yours" in beyond.json()["detail"]
        assert int(beyond.headers["Retry-After"]) >= 1
        asked.append(pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": 0}))
        until(lambda: measured(client, "peft_dnd_requests_in_work") == 4)
        assert client.get("/v1/tasks").status_code == 429
        assert client.get("/health/ready").status_code == 200
        gate.opened.set()
        assert [answer.result().status_code for answer in asked] == [201] * 4
    assert client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": 3}).status_code == 201
    assert sorted(gate.begun) == [0, 1, 2, 3]


async def ask_and_leave(app: FastAPI, seed: int, gone: asyncio.Event) -> list[dict]:
    """A POST whose client leaves once the event is set."""
    body = json.dumps({"prompts": PROMPTS, "seed": seed}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/adapters", "raw_path": b"/v1/adapters", "headers": headers}
    scope |= {"query_string": b"", "client": ("someone", 1), "server": ("here", 80), "scheme": "http", "root_path": ""}
    sent: list[dict] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_who_leaves_waits_no_more_and_nothing_is_made_for_nobody(serve, gate: Gate) -> None:
    client = serve()
    service = client.app.state.service

    async def leave() -> None:
        stays, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(ask_and_leave(client.app, 0, stays))
        while not gate.begun:
            await asyncio.sleep(0.005)
        shared = [asyncio.create_task(ask_and_leave(client.app, 1, event)) for event in (stays, leaves)]
        alone = asyncio.create_task(ask_and_leave(client.app, 2, leaves))
        while len(service.queue) < 2:
            await asyncio.sleep(0.005)
        leaves.set()
        assert await shared[1] == [] and await alone == []
        assert len(service.queue) == 1, "one of the two who want the same is still there"
        gate.opened.set()
        for task in (first, shared[0]):
            assert (await task)[0]["status"] == 201

    asyncio.run(leave())
    assert gate.begun == [0, 1]


def test_clients_take_turns() -> None:
    async def run() -> list[str]:
        queue, done, hold = DeviceQueue(10, 10), [], threading.Event()
        first = asyncio.create_task(queue.run("a", hold.wait))
        await asyncio.sleep(0.05)
        waiting = [
            asyncio.create_task(queue.run(name[0], lambda name=name: done.append(name)))
            for name in ("a1", "a2", "a3", "b1", "b2", "c1")
        ]
        await asyncio.sleep(0)
        hold.set()
        await asyncio.gather(first, *waiting)
        queue.close()
        assert not queue.alive
        return done

    assert asyncio.run(run()) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_failure_is_its_own_clients_alone() -> None:
    async def run() -> None:
        queue = DeviceQueue(1, 1)
        with pytest.raises(ZeroDivisionError):
            await queue.run("a", lambda: 1 / 0)
        assert await queue.run("a", lambda: 1) == 1
        hold = threading.Event()
        first = asyncio.create_task(queue.run("a", hold.wait))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.run("a", lambda: 2))
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="the most are 1"):
            await queue.run("b", lambda: 3)
        second.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(queue.run("b", lambda: 3))
        hold.set()
        assert await third == 3 and await first
        queue.close()

    asyncio.run(run())


def test_none_waits_longer_than_may_be(serve, gate: Gate) -> None:
    client = serve(queue_seconds=0.2)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": 0})
        gate.wait_for(1)
        begun = time.monotonic()
        late = client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": 1})
        assert late.status_code == 429 and "waited 0.2 s" in late.json()["detail"] and time.monotonic() - begun > 0.19
        assert int(late.headers["Retry-After"]) >= 1
        assert measured(client, "peft_dnd_adapters_waiting") == 0
        gate.opened.set()
        assert first.result().status_code == 201, "what is at the device is made to its end"
    assert client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": 1}).status_code == 201
    assert gate.begun == [0, 1], "and nothing for who was sent away"


def test_who_would_wait_too_long_is_told_at_once() -> None:
    async def run() -> None:
        queue, hold = DeviceQueue(10, 10, patience=30), threading.Event()
        await queue.run("a", lambda: time.sleep(0.01))
        queue._seconds = 16.0  # what one takes, as it were
        first = asyncio.create_task(queue.run("a", hold.wait))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.run("a", lambda: 2))  # in 16 s
        await asyncio.sleep(0)
        begun = time.monotonic()
        with pytest.raises(Problem, match="about 32 s, and the most is 30 s") as refused:
            await queue.run("a", lambda: 3)
        assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "2"
        with pytest.raises(Problem, match="about 32 s"):
            await queue.run("b", lambda: 3)
        assert time.monotonic() - begun < 10
        second.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(queue.run("b", lambda: 4))
        hold.set()
        assert await third == 4 and await first
        queue.close()

    asyncio.run(run())


def test_two_adapters_with_one_lock_wait_side_by_side(serve, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    cache = client.app.state.service.cache
    monkeypatch.setattr(cache, "lock_for", lambda name: cache.folder / "locks" / "make-one")
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": 0})]
        gate.wait_for(1)
        asked.append(pool.submit(client.post, "/v1/adapters", json={"prompts": PROMPTS, "seed": 1}))
        until(lambda: measured(client, "peft_dnd_adapters_waiting") == 1)
        gate.opened.set()
        assert [answer.result().status_code for answer in asked] == [201, 201]
