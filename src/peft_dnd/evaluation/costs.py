# SPDX-License-Identifier: Apache-2.0
"""What it costs to generate an adapter: seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """What a block of code took.

    Attributes:
        seconds: Wall-clock time.
        peak_bytes: The most memory beyond what was taken before: on a GPU of tensors there, otherwise of the process,
            which only Linux tells; `None` elsewhere.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device | None = None) -> Iterator[Cost]:
    """Measure what a block of code takes.

    Args:
        device: Where it computes.
    """
    cost = Cost()
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak()
    began = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _resident("VmHWM")
    if before is not None and peak is not None:
        cost.peak_bytes = max(peak - before, 0)


def module_bytes(module: nn.Module) -> int:
    """Memory of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adapter_bytes(adapter: GeneratedAdapter) -> int:
    """Memory of an adapter's matrices."""
    return sum(tensor.nbytes for tensor in adapter.state_dict().values())


def _reset_peak() -> int | None:
    """Have Linux forget the process's peak so far; the memory it takes now, or `None` where that cannot be done."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
