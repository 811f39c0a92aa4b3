# SPDX-License-Identifier: Apache-2.0
"""A generator's SHA-256: one hash of all its weights, and of the settings that they were fitted for.

It is that of the weights as they are in memory, wherever they came from: after loading in another dtype or further
fitting it is another, after saving and loading it is the same. A frozen text encoder is no part of it: that is a model
of its own, and may be the base itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..storage.processes import is_share
from ..storage.stored_weights import StoredTensor, stored_tensors
from .checksums import fitted_settings


_BYTES_AT_ONCE = 2**26
# Says that the statistics are there; transformers makes a float of it where it loads in half precision. So has each
# base's head.
_FLAG = "normalization.fitted"

# Generator -> its settings and tensors when the hash was taken, how often each of these had been changed by then, and
# the hash.
_Known = tuple[str, list["ref[Tensor]"], list[int], str]
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def generator_sha256(generator: Any) -> str | None:
    """The SHA-256 of a generator, taken anew only if its weights have changed since; 64 hexadecimal digits.

    Each tensor is hashed by its name, type, shape and bytes, and the hash is that of all these and of the settings.
    What is changed through `tensor.data`, of which torch keeps no count, goes unnoticed.

    Args:
        generator: A `PromptConditionedLoraGenerator`. What a streamed one leaves on disk is read there. Of one base's
            part of a generator of several the hash is that of the whole.

    Returns:
        `None` where the weights are here in part only, while several processes fit them.
    """
    generator = generator.whole or generator
    held_by_name = generator.state_dict(keep_vars=True).items()
    tensors = dict(sorted((name, tensor) for name, tensor in held_by_name if not name.endswith(_FLAG)))
    held = list(tensors.values())
    if any(is_share(tensor) for tensor in held):
        return None
    counts = [-1 if tensor.is_inference() else tensor._version for tensor in held]
    settings = json.dumps(_settings(generator), sort_keys=True)
    known = _KNOWN.get(generator)
    if known is not None and known[0] == settings and _unchanged(known, held, counts):
        return known[3]
    digest = hashlib.sha256(settings.encode())
    stored: dict[str, StoredTensor] = {}
    if any(tensor.is_meta for tensor in held):
        stored = stored_tensors(generator._folder)
    for name, tensor in tensors.items():
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode())
        for part in _parts(tensor, stored.get(name)):
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    found = digest.hexdigest()
    _KNOWN[generator] = (settings, [ref(tensor) for tensor in held], counts, found)
    return found


def _unchanged(known: _Known, held: list[Tensor], counts: list[int]) -> bool:
    if -1 in counts or known[2] != counts:  # as many tensors, then
        return False
    return all(reference() is tensor for reference, tensor in zip(known[1], held, strict=True))


def _parts(tensor: Tensor, stored: StoredTensor | None) -> Iterator[Tensor]:
    """A tensor on the CPU, in one part; one that is on disk in as many as keep memory bounded."""
    if not tensor.is_meta or stored is None:
        yield tensor.detach().cpu()
        return
    rows = max(1, _BYTES_AT_ONCE // max(1, stored.row_bytes))
    for start in range(0, stored.shape[0], rows):
        yield stored.read((start, min(start + rows, stored.shape[0]))).to(tensor.dtype)


def _settings(generator: Any) -> dict[str, Any]:
    return fitted_settings(json.loads(generator.config.to_json_string(use_diff=False)))
