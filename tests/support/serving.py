# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd serve` as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2


DOOR = [sys.executable, "-c", "import sys, peft_dnd_cli; sys.exit(peft_dnd_cli.main())"]


class Serving:
    """A running service.

    Attributes:
        process: Its process.
        client: Speaks HTTP to it.
        log: What it has written to standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.client, self._log = process, httpx2.Client(base_url=url, timeout=60), log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 600  # where many share the processors, importing torch takes minutes
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.1)

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        self.process.send_signal(with_signal)
        return self.process.wait(300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    generator: Path, cache: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """A service of a generator, which is killed at the end if it still runs. It is not waited for."""
    port = free_port()
    log = cache.with_name(f"{cache.name}-{port}.log")
    arguments = ["serve", "--generator", f"tiny={generator}", "--cache", str(cache), "--port", str(port), *options]
    with log.open("wb") as errors:
        process = subprocess.Popen([*DOOR, *arguments], stderr=errors, env={**os.environ, **(environment or {})})
    running = Serving(process, f"http://127.0.0.1:{port}", log)
    try:
        yield running
    finally:
        running.client.close()
        if process.poll() is None:
            process.kill()
            process.wait()
