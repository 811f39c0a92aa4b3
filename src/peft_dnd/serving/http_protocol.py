# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP with an end to its patience: a connection that has begun no whole request is closed."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """Closes a connection that sends its request's headers too slowly, or none.

    uvicorn itself waits for these for ever, so that whoever opens connections and says little would use them all up.

    Attributes:
        patience: Seconds from when a connection is open, or its last answer has ended, to the next request's last
            header.
    """

    patience = 20.0

    _free_since = 0.0
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        self._free_since = self.loop.time()
        self._look_later(self.patience)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        super().connection_lost(exc)
        if self._watch is not None:
            self._watch.cancel()

    def on_response_complete(self) -> None:
        """Begin anew to count."""
        self._free_since = self.loop.time()
        super().on_response_complete()

    def _look_later(self, seconds: float) -> None:
        self._watch = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being worked on
            self._look_later(self.patience)
            return
        left = self._free_since + self.patience - self.loop.time()
        if left > 0:
            self._look_later(left)
        else:
            self.transport.close()
