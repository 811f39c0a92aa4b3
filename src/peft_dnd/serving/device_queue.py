# SPDX-License-Identifier: Apache-2.0
"""Turns at the device: one piece of work at a time, clients in turn, and not too many waiting."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .problems import busy


_Result = TypeVar("_Result")
_FIRST_GUESS = 1.0


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DeviceQueue:
    """Runs work one piece after another in a thread of its own, each client's first before any client's second.

    Tasks are read and decoded one by one in any case, so that the bytes do not depend on what else is asked for;
    taking several at once would not be quicker.

    Args:
        most: How many pieces may wait.
        most_of_one: How many of one client.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        # Clients in the order of their turns.
        self._waiting: dict[str, deque[_Job]] = {}
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._worker: asyncio.Task[None] | None = None
        self._seconds = _FIRST_GUESS

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))  # metrics are read in another thread

    @property
    def alive(self) -> bool:
        """Whether work is still taken."""
        return not getattr(self._device, "_shutdown", False)

    async def run(self, client: str, work: Callable[[], _Result]) -> _Result:
        """Wait for the client's turn, and run the work.

        Args:
            client: Who waits.
            work: What is run; whoever stops waiting before its turn takes it out of the queue.

        Raises:
            Problem: If there are too many waiting, with the seconds until there will be fewer.
        """
        own = self._waiting.get(client, deque())
        if len(self) >= self._most or len(own) >= self._most_of_one:
            raise busy(
                f"{len(self)} adapters are waiting to be made, {len(own)} of them yours; the most are {self._most} "
                f"and {self._most_of_one}. Try again later.",
                math.ceil(self._seconds * (len(self) + 1)),
            )
        job = _Job(work)
        self._waiting.setdefault(client, own).append(job)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work_off())
        try:
            result: _Result = await job.result
            return result
        except asyncio.CancelledError:
            self._take_out(client, job)
            raise

    def close(self) -> None:
        """Take no more work. What is being made is made to its end."""
        self._device.shutdown(wait=True, cancel_futures=True)

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while job := self._next():
                if job.result.done():  # nobody waits for it any more
                    continue
                began = time.monotonic()
                try:
                    result = await loop.run_in_executor(self._device, job.work)
                except Exception as error:
                    if not job.result.done():
                        job.result.set_exception(error)
                else:
                    if not job.result.done():
                        job.result.set_result(result)
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        finally:
            self._worker = None

    def _next(self) -> _Job | None:
        if not self._waiting:
            return None
        client, jobs = next(iter(self._waiting.items()))
        del self._waiting[client]
        job = jobs.popleft()
        if jobs:
            self._waiting[client] = jobs  # behind all others
        return job

    def _take_out(self, client: str, job: _Job) -> None:
        jobs = self._waiting.get(client)
        if jobs is not None:
            with suppress(ValueError):
                jobs.remove(job)
            if not jobs:
                del self._waiting[client]
