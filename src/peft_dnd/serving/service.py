# SPDX-License-Identifier: Apache-2.0
"""The service without its HTTP: adapters by id and by task, each made once, whoever asks for it and how often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import GeneratorConfigError, OutOfDistributionError
from .cache import AdapterCache, OpenAdapter
from .device_queue import DeviceQueue
from .generators import ServedGenerator
from .limits import ServiceLimits
from .locks import alone
from .metrics import ServiceMetrics
from .problems import Problem
from .tasks import Task, TaskNames, TaskPrompts


Facts = dict[str, Any]


@dataclass(eq=False)
class _Flight:
    """An adapter on its way, and how many wait for it."""

    task: asyncio.Task[Facts]
    waiting: int = 0


class AdapterService:
    """Makes, keeps and hands out adapters.

    Args:
        generators: The generators, of different names; the first is taken where none is named.
        cache: Where adapters are kept.
        limits: What may be asked for.
        tasks: Tasks that have a name from the start, name -> what their adapter is made from.
        remember_prompts: Whether the prompts of tasks that clients name are written into the cache folder, so that
            their adapters can be made again.

    Raises:
        GeneratorConfigError: If there is no generator, or two have one name.
    """

    def __init__(
        self,
        generators: Sequence[ServedGenerator],
        cache: AdapterCache,
        limits: ServiceLimits | None = None,
        *,
        tasks: Mapping[str, TaskPrompts] | None = None,
        remember_prompts: bool = False,
    ) -> None:
        self.generators = {generator.name: generator for generator in generators}
        if not generators or len(self.generators) < len(generators):
            raise GeneratorConfigError(
                f"Generators need different names, and there must be one at least; got {[g.name for g in generators]}."
            )
        self.cache, self.limits = cache, limits or cache.limits
        self.tasks = TaskNames(cache.tasks, self.limits.tasks, remember_prompts=remember_prompts, fixed=tasks)
        self.queue = DeviceQueue(self.limits.queue, self.limits.most_of_one_client, self.limits.queue_seconds)
        self.metrics = ServiceMetrics(self.queue, cache)
        self._flights: dict[str, _Flight] = {}
        self._writable_at = float("-inf")

    def close(self) -> None:
        """End what is being made, and leave nothing in the cache folder that is of no use."""
        self.queue.close()
        self.cache.close()

    def generator(self, name: str | None) -> ServedGenerator:
        """The generator of a name; the first if none is given.

        Raises:
            Problem: If there is none.
        """
        found = next(iter(self.generators.values())) if name is None else self.generators.get(name)
        if found is None:
            raise Problem(422, f"There is no generator {name!r:.200}. There are: {', '.join(self.generators)}.")
        return found

    async def adapter(self, source: TaskPrompts, client: str) -> tuple[Facts, bool]:
        """What is known of the adapter of some prompts, which is made if it is not there.

        Args:
            source: The prompts and options.
            client: Who asks.

        Returns:
            The adapter's facts, and whether it was made for this request.

        Raises:
            Problem: If the request cannot be met.
            PeftDndError: If the prompts cannot be used.
        """
        self.check(source)
        generator = self.generator(source.generator)
        name = await asyncio.to_thread(generator.adapter_id, source)
        facts = await asyncio.to_thread(self.cache.facts, name)
        made = facts is None
        if facts is None:
            facts = await self._shared(name, generator, source, client)
        self.metrics.asked(generator.name, made=made)
        _refuse(facts, source)
        return facts, made

    async def adapter_of_task(self, name: str, client: str, base: str | None = None) -> tuple[Facts, bool]:
        """The same for a task that has a name.

        Args:
            name: The task's name.
            client: Who asks.
            base: For which of a generator's several bases; by default as the task was put.

        Raises:
            Problem: If there is none, or its adapter is gone, or is another base's, and its prompts are not known.
        """
        task = await self.task(name)
        if task.source is not None:
            source = task.source if base is None else replace(task.source, base=base)
            facts, made = await self.adapter(source, client)
            if base is None and facts["id"] != task.adapter and not task.fixed:
                await asyncio.to_thread(self.tasks.put, name, facts["id"], task.source)
            return facts, made
        kept = await asyncio.to_thread(self.cache.facts, task.adapter or "")
        if kept is None:
            raise Problem(
                410, f"The adapter of task {name!r} is no longer kept, and its prompts were not. Put the task again."
            )
        if base not in (None, kept.get("base"), kept["base_model"]):
            raise Problem(
                410,
                f"The adapter of task {name!r} is for the base {kept.get('base') or kept['base_model']!r}, and its "
                f"prompts were not kept. Put the task again for {base!r}.",
            )
        return kept, False

    async def name_task(self, name: str, source: TaskPrompts, client: str) -> tuple[Facts, bool]:
        """Give a name to the adapter of some prompts, which is made if it is not there.

        Returns:
            The adapter's facts, and whether the name is new.
        """
        self.tasks.check_free(name)
        facts, _ = await self.adapter(source, client)
        known = await asyncio.to_thread(self.tasks.get, name)
        await asyncio.to_thread(self.tasks.put, name, facts["id"], source)
        return facts, known is None

    async def task(self, name: str) -> Task:
        """A task by its name.

        Raises:
            Problem: If there is none.
        """
        task = await asyncio.to_thread(self.tasks.get, name)
        if task is None:
            raise Problem(404, f"There is no task {name!r:.200}.")
        return task

    async def open(self, name: str) -> OpenAdapter:
        """Open an adapter for reading.

        Raises:
            Problem: If it is not there.
        """
        opened = await asyncio.to_thread(self.cache.open, name)
        if opened is None:
            raise no_adapter(name)
        return opened

    def check_ready(self) -> None:
        """Make sure that adapters can be made; the disk is tried at most once a second, however often one asks.

        Raises:
            Problem: If they cannot.
        """
        if not self.queue.alive:
            raise Problem(503, "The service is stopping.")
        if time.monotonic() - self._writable_at > 1:
            try:
                self.cache.check_writable()
            except OSError as error:
                raise Problem(503, "The cache folder cannot be written to.") from error
            self._writable_at = time.monotonic()

    def check(self, source: TaskPrompts) -> None:
        """Hold prompts against the bounds.

        Raises:
            Problem: If they are beyond them.
        """
        if len(source.prompts) > self.limits.prompts:
            raise Problem(422, f"There are {len(source.prompts)} prompts; the most are {self.limits.prompts}.")
        longest = max(map(len, (*source.prompts, *(source.answers or ()))), default=0)
        if longest > self.limits.prompt_characters:
            raise Problem(
                422, f"A prompt has {longest} characters; the most are {self.limits.prompt_characters}. Shorten it."
            )

    async def _shared(self, name: str, generator: ServedGenerator, source: TaskPrompts, client: str) -> Facts:
        """Wait for the adapter, with all who want the same; once nobody waits any more it is not made."""
        flight = self._flights.get(name)
        if flight is None or flight.task.cancelled():
            work = partial(self._make, name, generator, source)
            flight = _Flight(asyncio.create_task(self.queue.run(client, work)))
            self._flights[name] = flight
            flight.task.add_done_callback(partial(self._landed, name, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                if self._flights.get(name) is flight:
                    del self._flights[name]

    def _landed(self, name: str, flight: _Flight, task: asyncio.Task[Facts]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not task.cancelled():
            task.exception()  # who waits is told; if nobody does, nobody need be

    def _make(self, name: str, generator: ServedGenerator, source: TaskPrompts) -> Facts:
        # Other processes are kept from making the same only now, not while it waits for its turn: the few locks are
        # shared, and whoever held one in the queue would make others wait for two turns.
        with alone(self.cache.lock_for(name)):
            kept = self.cache.facts(name)
            if kept is not None:
                return kept
            # Storing it is part of the turn, so that there is never more than one in memory.
            began = time.monotonic()
            adapter = generator.generate(source)
            self.metrics.made(generator.name, time.monotonic() - began)
            return self.cache.put(name, adapter, generator.facts(source, adapter))


def no_adapter(name: str) -> Problem:
    """What is said of an adapter that is not there."""
    return Problem(
        404, f"There is no adapter {name!r:.100}: it was never made here, or is no longer kept. Post again."
    )


def _refuse(facts: Mapping[str, Any], source: TaskPrompts) -> None:
    """An adapter that was made before is refused as it would be if it were made now."""
    score, threshold = facts["out_of_distribution"], facts["out_of_distribution_threshold"]
    if source.out_of_distribution == "refuse" and score is not None and score > threshold:
        raise OutOfDistributionError(
            f"The prompts are unlike those of the tasks that the generator was fitted on: their out-of-distribution "
            f"score of {score:.3f} is above the threshold of {threshold:.3g}. Check the prompts."
        )
