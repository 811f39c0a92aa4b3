# SPDX-License-Identifier: Apache-2.0
"""Connections that say little are closed; those whose request is being worked on, and others, are not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from peft_dnd.serving.http_protocol import PatientProtocol


class Hasty(PatientProtocol):
    patience = 0.3


async def slow_app(scope: dict, receive: object, send: object) -> None:
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(slow_app, http=Hasty, lifespan="off", log_config=None, timeout_keep_alive=30)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    assert connection.recv(1000) == b""
    return time.monotonic() - began


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\nHost: here\r\nX-Slow: "])
def test_who_says_little_is_left(port: int, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(words)
        assert seconds_until_closed(connection) < 5


def test_who_waits_for_an_answer_gets_it_and_is_left_afterwards(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 204")
        connection.sendall(b"GET /")
        assert seconds_until_closed(connection) < 5
