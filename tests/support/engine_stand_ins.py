# SPDX-License-Identifier: Apache-2.0
"""Stand-ins of what engines meet: vLLM's request class, and a service over HTTP."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LoRARequest:
    """As `vllm.lora.request.LoRARequest` is made and checked."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str]


class StandIn:
    """An HTTP server whose answers a test sets: path -> answer, or a function of the request's body."""

    def __init__(self) -> None:
        self.answers: dict[str, Reply | Callable[[bytes], Reply]] = {}
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stand_in.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
                answer = stand_in.answers.get(self.path, Reply(404, b'{"detail": "no such thing"}', {}))
                answer = answer if isinstance(answer, Reply) else answer(body)
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def says(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers[path] = Reply(status, content, headers)


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()
