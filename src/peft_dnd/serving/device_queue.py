# SPDX-License-Identifier: Apache-2.0
"""Turns at the device: one piece of work at a time, clients in turn, and neither too many waiting nor for too long."""

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
# What one piece of work is said to take before any has been done.
_FIRST_GUESS = 1.0


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    deadline: asyncio.TimerHandle | None = None


class DeviceQueue:
    """Runs work one piece after another in a thread of its own, each client's first before any client's second.

    Tasks are read and decoded one by one in any case, so that the bytes do not depend on what else is asked for;
    taking several at once would not be quicker.

    Args:
        most: How many pieces may wait.
        most_of_one: How many of one client.
        patience: How many seconds one may wait for its turn. What is expected to wait longer is refused at once, and
            what has waited so long is refused then.
    """

    def __init__(self, most: int, most_of_one: int, patience: float = math.inf) -> None:
        self._most, self._most_of_one, self._patience = most, most_of_one, patience
        # Clients in the order of their turns.
        self._waiting: dict[str, deque[_Job]] = {}
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._worker: asyncio.Task[None] | None = None
        # What one piece took lately, and when the one at the device began.
        self._seconds: float | None = None
        self._began: float | None = None

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
            Problem: If there are too many waiting, or its turn does not come soon enough, with the seconds until it
                may.
        """
        own = self._waiting.get(client, deque())
        if len(self) >= self._most or len(own) >= self._most_of_one:
            raise busy(
                f"{len(self)} adapters are waiting to be made, {len(own)} of them yours; the most are {self._most} "
                f"and {self._most_of_one}. Try again later.",
                self._guess(len(self) + 1),
            )
        expected = self._until_turn_of(len(own))
        if expected > self._patience:
            raise busy(
                f"{len(self)} adapters are waiting to be made, {len(own)} of them yours: yours would wait about "
                f"{expected:.0f} s, and the most is {self._patience:g} s. Try again later.",
                math.ceil(expected - self._patience),
            )
        job = _Job(work)
        self._waiting.setdefault(client, own).append(job)
        if self._patience < math.inf:
            job.deadline = asyncio.get_running_loop().call_later(self._patience, self._give_up, client, job)
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
                self._began = began = time.monotonic()
                try:
                    result = await loop.run_in_executor(self._device, job.work)
                except Exception as error:
                    if not job.result.done():
                        job.result.set_exception(error)
                else:
                    if not job.result.done():
                        job.result.set_result(result)
                took = time.monotonic() - began
                self._seconds = took if self._seconds is None else self._seconds + 0.2 * (took - self._seconds)
                self._began = None
        finally:
            self._worker = self._began = None

    def _guess(self, pieces: int) -> int:
        """Seconds that so many pieces of work will take."""
        return math.ceil((self._seconds or _FIRST_GUESS) * pieces)

    def _until_turn_of(self, own: int) -> float:
        """Seconds that a client's next piece is expected to wait; 0 as long as none has been done."""
        if self._seconds is None:
            return 0.0
        ahead = sum(min(len(jobs), own + 1) for jobs in self._waiting.values())
        at_device = 0.0 if self._began is None else max(0.0, self._began + self._seconds - time.monotonic())
        return at_device + ahead * self._seconds

    def _give_up(self, client: str, job: _Job) -> None:
        self._take_out(client, job)
        if not job.result.done():
            text = f"The adapter has waited {self._patience:g} s for its turn, the most. Try again later."
            job.result.set_exception(busy(text, self._guess(len(self) + 1)))

    def _next(self) -> _Job | None:
        if not self._waiting:
            return None
        client, jobs = next(iter(self._waiting.items()))
        del self._waiting[client]
        job = jobs.popleft()
        if job.deadline is not None:
            job.deadline.cancel()
        if jobs:
            self._waiting[client] = jobs  # behind all others
        return job

    def _take_out(self, client: str, job: _Job) -> None:
        if job.deadline is not None:
            job.deadline.cancel()
        jobs = self._waiting.get(client)
        if jobs is not None:
            with suppress(ValueError):
                jobs.remove(job)
            if not jobs:
                del self._waiting[client]
