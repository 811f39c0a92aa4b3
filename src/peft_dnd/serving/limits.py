# SPDX-License-Identifier: Apache-2.0
"""Every bound of the service, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import GeneratorConfigError


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """What a client may ask for, how much may wait, and how much is kept.

    Attributes:
        request_bytes: The largest body of a request, in bytes.
        prompts: The most prompts of a task.
        prompt_characters: The longest prompt or answer, in characters.
        requests: Requests that are worked on at once, downloads and waiting ones among them.
        queue: Adapters that wait for the device at once.
        queue_per_client: How many of them one client may have there; `None` is half of `queue`, at least 1.
        queue_seconds: How long an adapter may wait there for its turn; it should be well below what clients allow
            for an answer.
        cache_bytes: Size of all adapters kept, in bytes.
        cache_adapters: How many are kept.
        cache_seconds: How long one is kept after it was made, in seconds.
        tasks: How many tasks may have a name.
        body_seconds: How long a client may take to send a request's body.
        answer_seconds: How long a request may take altogether, until its answer's last byte is read.

    Raises:
        GeneratorConfigError: If a bound is below 1.
    """

    request_bytes: int = 1 << 20
    prompts: int = 1024
    prompt_characters: int = 20_000
    requests: int = 64
    queue: int = 32
    queue_per_client: int | None = None
    queue_seconds: float = 30
    cache_bytes: int = 10 << 30
    cache_adapters: int = 1000
    cache_seconds: float = 7 * 24 * 3600
    tasks: int = 1000
    body_seconds: float = 30
    answer_seconds: float = 600

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise GeneratorConfigError(f"The bound {field.name} of the service must be above 0, got {value!r}.")

    @property
    def most_of_one_client(self) -> int:
        """Adapters of one client that may wait for the device at once."""
        return self.queue_per_client or max(1, self.queue // 2)
