# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: contestants that take turns, their median and spread, and a record of where they ran."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from peft_dnd.storage.files import write_json


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("peft-dnd", "peft", "transformers", "torch")


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code that is measured. Names no path of the machine."""
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        # A benchmark that ran a moment ago changed its own result; that does not count.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_result(name: str, result: Mapping[str, Any], command: str | None = None) -> Path:
    """Write a benchmark's figures, and what they depend on, to `results/<name>.json`; print them as well.

    Args:
        name: The result's name, usually that of the script without `bench_`.
        result: The figures. Where something is random, with its seed.
        command: What runs the benchmark again; `None` takes what this process was called with.
    """
    called = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {"command": command or called, "environment": environment(), **result}
    path = RESULTS / f"{name}.json"
    write_json(path, record)
    print(json.dumps(record, indent=2))
    return path


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Time contestants in turn (A, B, A, B, ...), so that all meet the same machine, after one untimed round.

    Args:
        contestants: Name -> what is timed.
        repeats: How many timed rounds.
        clock: Gives seconds; by default those that pass. `time.process_time` counts what the processor spent on this
            process alone, where others keep it busy.

    Returns:
        Name -> seconds of each of the `repeats` rounds, for [`spread`] and [`ratio`].
    """
    clock = clock or _clock
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(repeats):
        for name, contestant in contestants.items():
            began = clock()
            contestant()
            seconds[name].append(clock() - began)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """How many times as long: the ratio of each round's pair of seconds, to three places, with its spread."""
    paired = spread([one / other for one, other in zip(of, to, strict=True)])
    return {name: round(value, 3) for name, value in paired.items()}


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
