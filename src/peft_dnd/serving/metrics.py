# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads: requests, adapters made and found, what waits, what is kept, the process itself."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .cache import AdapterCache
from .device_queue import DeviceQueue


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_LOOK_AGAIN_AFTER = 5.0


class ServiceMetrics:
    """The service's counters, in a registry of their own.

    Args:
        queue: What waits for the device.
        cache: What is kept.
    """

    def __init__(self, queue: DeviceQueue, cache: AdapterCache) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "peft_dnd_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "peft_dnd_request_seconds", "Until an answer's end.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._asked = Counter(
            "peft_dnd_adapters_asked",
            "Adapters asked for, found or made.",
            ["generator", "found"],
            registry=self.registry,
        )
        self._made = Histogram(
            "peft_dnd_generation_seconds", "To generate one.", ["generator"], buckets=_SECONDS, registry=self.registry
        )
        self.in_work = Gauge("peft_dnd_requests_in_work", "Requests being worked on.", registry=self.registry)
        waiting = Gauge("peft_dnd_adapters_waiting", "Adapters that wait for the device.", registry=self.registry)
        waiting.set_function(lambda: len(queue))
        self.registry.register(_Kept(cache))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def asked(self, generator: str, *, made: bool) -> None:
        """Count an adapter that was asked for."""
        self._asked.labels(generator, "no" if made else "yes").inc()

    def made(self, generator: str, seconds: float) -> None:
        """Count an adapter that was made."""
        self._made.labels(generator).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Kept(Collector):
    """How much the cache folder holds, looked up at most every few seconds."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._found, self._at = (0, 0), float("-inf")

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What the registry asks for."""
        if time.monotonic() - self._at > _LOOK_AGAIN_AFTER:
            self._found, self._at = self._cache.size(), time.monotonic()
        count, size = self._found
        yield GaugeMetricFamily("peft_dnd_adapters_kept", "Adapters in the cache folder.", value=count)
        yield GaugeMetricFamily("peft_dnd_kept_bytes", "Their size.", value=size)
