# SPDX-License-Identifier: Apache-2.0
"""Running checksums of bytes that come by in pieces: sums of 8-byte words, and CRC-32, which earlier folders have.

All bytes have to be read when a model is checked, and of what is in memory already little else may be done, lest it
take longer than loading it. Adding up is what processors do fastest: on one core these sums take about a third of the
time of CRC-32 in Python's library, and hardly more than the system takes to bring the pages of the file.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Protocol

import numpy as np


_COLUMNS = 1024
_ROW_BYTES = 8 * _COLUMNS
# As many rows at once as stay in a core's cache between the two sums.
_ROWS_AT_ONCE = 128


class RunningSum(Protocol):
    """A checksum that pieces of the bytes are added to, in their order."""

    def update(self, piece: memoryview) -> None:
        """Take the next bytes, any number of them, contiguous."""

    def hexdigest(self) -> str:
        """The checksum of what has come by."""


class GridSums:
    """64 bits from the sums of the rows and of the columns of a grid of words.

    The bytes are laid out as rows of 1024 little-endian words of 8 bytes. The sums of the rows and of the columns,
    modulo 2^64, and what is left over after the last whole row, go into BLAKE2b. Damage to at most three words changes
    some sum for certain: a row whose sum stays needs two changed words, and so does each of their columns. So does an
    exchange of two words, rows or columns that differ. Other damage passes by an accident of one in 2^64, forgery
    easily.

    Args:
        start: What is put before the bytes.
    """

    def __init__(self, start: bytes = b"") -> None:
        self._digest = hashlib.blake2b(start, digest_size=8)
        self._columns: np.ndarray | None = None
        self._rest = b""

    def update(self, piece: memoryview) -> None:
        """Take the next bytes, any number of them, contiguous."""
        if self._rest:
            wanted = _ROW_BYTES - len(self._rest)
            self._rest += piece[:wanted]
            piece = piece[wanted:]
            if len(self._rest) < _ROW_BYTES:
                return
            self._add_rows(memoryview(self._rest))
            self._rest = b""
        whole = len(piece) // _ROW_BYTES * _ROW_BYTES
        if whole:
            self._add_rows(piece[:whole])
        self._rest = bytes(piece[whole:])

    def hexdigest(self) -> str:
        """The checksum of what has come by: 16 hexadecimal digits."""
        digest = self._digest.copy()
        if self._columns is not None:
            digest.update(self._columns.tobytes())
        digest.update(self._rest)
        return digest.hexdigest()

    def _add_rows(self, whole: memoryview) -> None:
        grid = np.frombuffer(whole, "<u8").reshape(-1, _COLUMNS)
        for first in range(0, len(grid), _ROWS_AT_ONCE):
            rows = grid[first : first + _ROWS_AT_ONCE]
            self._digest.update(np.add.reduce(rows, axis=1).tobytes())
            columns = np.add.reduce(rows, axis=0)
            self._columns = columns if self._columns is None else self._columns + columns


class Crc32:
    """CRC-32, eight hexadecimal digits.

    Args:
        start: What is put before the bytes.
    """

    def __init__(self, start: bytes = b"") -> None:
        self._found = zlib.crc32(start)

    def update(self, piece: memoryview) -> None:
        """Take the next bytes, any number of them, contiguous."""
        self._found = zlib.crc32(piece, self._found)

    def hexdigest(self) -> str:
        """The checksum of what has come by."""
        return f"{self._found:08x}"


SUMS: dict[str, type[GridSums] | type[Crc32]] = {"grid64": GridSums, "crc32": Crc32}
"""The checksums that a folder may have, by the names that it has for them."""
