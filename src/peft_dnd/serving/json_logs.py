# SPDX-License-Identifier: Apache-2.0
"""Logs that a machine reads: one JSON object a line, without a word of any prompt."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import datetime, timezone
from types import TracebackType
from typing import Any


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: time, level, logger, message, and the record's `facts` if it has some.

    Of an exception there is its kind and where it was raised, not its message: that might quote what a client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["raised_at"] = places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=True, default=str)


def places(trace: TracebackType | None) -> list[str]:
    """Where an exception passed through, innermost last: `file:line in function`."""
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(trace)]
