# SPDX-License-Identifier: Apache-2.0
"""Tensors in a model's safetensors files, read one at a time or by slices of their first axis, never the whole file.

Also what a name of a floating-point type means, as callers give it for what they read.

Plain reads rather than a memory map: what is read through a map stays counted as this process's memory for as long as
the system likes, and the point here is to stay below a bound.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CorruptFileError, GeneratorConfigError
from .files import read_json


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The file begins with the header's length, in this many bytes; the header is JSON, and the numbers follow.
_LENGTH_BYTES = 8
# As the safetensors library has it.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a safetensors file.

    Attributes:
        path: The file.
        offset: Where in it the tensor's bytes begin.
        shape: The tensor's shape.
        dtype: The type of its numbers.
    """

    path: Path
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """How much memory one entry of its first axis takes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read it to the CPU.

        Args:
            rows: The first entry of its first axis to read, and the one to stop before; `None` reads all.

        Raises:
            FileNotFoundError: If the file is gone.
            CorruptFileError: If the file ends too early.
        """
        start, shape = 0, self.shape
        if rows is not None:
            start, shape = rows[0], torch.Size([rows[1] - rows[0], *self.shape[1:]])
        found = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        missing = found.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.row_bytes)
            while missing.nbytes:
                count = file.readinto(missing)
                if not count:
                    raise CorruptFileError(_cut_short(self.path))
                missing = missing[count:]
        return found.view(self.dtype).view(shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model that transformers saved, in one file or in shards, by name. Reads headers only.

    Args:
        folder: The model's folder.

    Raises:
        FileNotFoundError: If there are no weights in safetensors format, or a shard is missing.
        CorruptFileError: If a file is cut short or is no safetensors file.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return _tensors_of_file(single)
    found: dict[str, StoredTensor] = {}
    for shard in _shards(index):
        found.update(_tensors_of_file(folder / shard))
    return found


# Beside the index, and no longer than file systems have names.
_FILE_NAME = re.compile(r"[^/\\\x00]{1,50}\.safetensors")


def _shards(index: Path) -> list[str]:
    """The files that an index names, all of them beside it."""
    data = read_json(index)
    whole = isinstance(data, dict) and isinstance(data.get("metadata"), dict)
    places = data.get("weight_map") if whole else None
    shards: list[Any] = list(places.values()) if isinstance(places, dict) else [None]
    for shard in shards:
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise CorruptFileError(
                f"{str(index)!r} is no index of a model's weights: expected in its weight_map the name of a "
                f".safetensors file beside it for each tensor, found {shard!r:.80}. Save or fetch the model again."
            )
    return sorted(set(shards))


def _tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        size = path.stat().st_size
        if length > min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise CorruptFileError(_cut_short(path))
        text = file.read(length)
    begin = _LENGTH_BYTES + length
    try:
        header: Mapping[str, Any] = json.loads(text)
        tensors = {name: _stored(path, begin, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptFileError(
            f"{str(path)!r} is not a safetensors file that can be read here ({type(error).__name__}: {error!s:.200}). "
            "It may have been damaged in copying, or hold numbers of an unknown type: save or fetch the model again."
        ) from error
    if any(tensor.offset + tensor.num_bytes > size for tensor in tensors.values()):
        raise CorruptFileError(_cut_short(path))
    return tensors


def _stored(path: Path, begin: int, entry: Mapping[str, Any]) -> StoredTensor:
    """What an entry of the header says, if it can be so."""
    first, last = entry["data_offsets"]
    sizes = [*entry["shape"], first, last]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**62 for size in sizes):
        raise ValueError(f"expected a shape and places in the file, found {dict(entry)!r:.100}")
    tensor = StoredTensor(path, begin + first, torch.Size(entry["shape"]), _DTYPES[entry["dtype"]])
    if tensor.num_bytes != last - first:
        raise ValueError(f"a tensor of {tensor.num_bytes} bytes has a place of {last - first}")
    return tensor


def _cut_short(path: Path) -> str:
    return (
        f"{str(path)!r} is shorter than its header says. It was cut short in writing or downloading: save the model "
        "again, or fetch it again with force_download=True."
    )


def floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The floating-point type that is meant, given itself or by its name.

    >>> floating_dtype("bfloat16")
    torch.bfloat16

    Raises:
        GeneratorConfigError: If there is none of that name.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise GeneratorConfigError(
            f"dtype must be a floating-point torch.dtype or its name, such as 'float32' or 'bfloat16'; got {dtype!r}."
        )
    return found
