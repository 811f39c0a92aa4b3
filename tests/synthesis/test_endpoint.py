# SPDX-License-Identifier: Apache-2.0
"""A writer behind a server of OpenAI's protocol: a server on this machine that speaks it, and can go wrong."""

from __future__ import annotations

import pytest
from support.openai_server import Server

from peft_dnd.errors import EngineError
from peft_dnd.synthesis import EndpointWriter, Written


pytest_plugins = ("support.openai_server",)


def test_a_chat_model_is_asked_as_the_protocol_has_it(server: Server, url: str) -> None:
    server.answer = {"choices": [{"message": {"content": "1. a\nstop b"}, "finish_reason": "stop"}]}
    writer = EndpointWriter(url, "big", token="secret")
    found = writer.write(["one", "two"], max_new_tokens=9, temperature=0.5, seed=3, stop="\nstop")
    assert found == [Written("1. a", True)] * 2
    path, token, body = server.asked[1]
    assert (path, token) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "big",
        "max_tokens": 9,
        "temperature": 0.5,
        "stop": ["\nstop"],
        "seed": 4,
        "messages": [{"role": "user", "content": "two"}],
    }
    assert (writer.name, writer.chats) == ("big", True)


def test_a_completion_model_continues_a_text(server: Server, url: str) -> None:
    server.answer = {"choices": [{"text": " and on", "finish_reason": "length"}]}
    assert EndpointWriter(url, "big", chats=False).write(["on"], max_new_tokens=2) == [Written(" and on", False)]
    path, token, body = server.asked[0]
    assert (path, token, body["prompt"]) == ("/v1/completions", None, "on") and "messages" not in body


def test_a_refusal_is_an_empty_text(server: Server, url: str) -> None:
    server.answer = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    assert EndpointWriter(url, "big").write(["x"], max_new_tokens=2) == [Written("", True)]


def test_what_goes_wrong_is_said_without_the_token(server: Server, url: str) -> None:
    writer = EndpointWriter(url, "bigg", token="secret")
    for status, answer, words in (
        (404, {"error": {"message": "The model 'bigg' does not exist."}}, "does not exist"),
        (401, {"error": {"message": "no"}}, "Check the token"),
        (500, {"error": "out of memory"}, "out of memory"),
        (200, {"choices": []}, "no choice"),
        (200, {"choices": [{"text": "x"}]}, "no choice"),
        (200, [], "no JSON object"),
    ):
        server.status, server.answer = status, answer
        with pytest.raises(EngineError, match=words) as caught:
            writer.write(["x"], max_new_tokens=2)
        assert "secret" not in str(caught.value)
    with pytest.raises(EngineError, match="cannot be reached"):
        EndpointWriter("http://127.0.0.1:9/v1", "big").write(["x"], max_new_tokens=2)
    with pytest.raises(EngineError, match="must be like"):
        EndpointWriter("localhost:8000", "big")
