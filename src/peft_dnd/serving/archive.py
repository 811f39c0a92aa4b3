# SPDX-License-Identifier: Apache-2.0
"""An adapter's files as one tar, written as it is sent: the same bytes every time, and none of them in memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO


_CHUNK = 1 << 18


def tar_size(sizes: Mapping[str, int]) -> int:
    """How many bytes the tar of files of such sizes has."""
    blocks = sum(1 + -(-size // tarfile.BLOCKSIZE) for size in sizes.values())
    return -(-(blocks + 2) * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def tar_chunks(files: Mapping[str, BinaryIO], sizes: Mapping[str, int]) -> Iterator[bytes]:
    """Write the files as a tar, piece by piece.

    Args:
        files: Name in the tar -> an open file, read from its beginning.
        sizes: Name -> its size in bytes.
    """
    written = 0
    for name, file in files.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = sizes[name], 0o644
        header = entry.tobuf(tarfile.USTAR_FORMAT)
        yield header
        yield from file_chunks(file)
        padding = b"\0" * (-sizes[name] % tarfile.BLOCKSIZE)
        if padding:
            yield padding
        written += len(header) + sizes[name] + len(padding)
    yield b"\0" * (tar_size(sizes) - written)


def file_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Read an open file from its beginning, piece by piece."""
    file.seek(0, io.SEEK_SET)
    while chunk := file.read(_CHUNK):
        yield chunk
