# SPDX-License-Identifier: Apache-2.0
"""What checksums cost when a generator is loaded: the first time in a process, when all bytes are read, and later.

python benchmarks/bench_checksums.py

Generators of the default family for a 0.5B and a 7B base, with random weights. The contestants take turns: with
checksums that this process has not compared yet, with those that it has, and without. Processor seconds are those of
all threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import ratio, spread, write_result

from peft_dnd import PaperSettings, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.storage import checksums


REPEATS = 9
SETTINGS = {"0.5b": "common-sense-0.5b", "7b": "math-7b"}


def main() -> None:
    """Measure, print and keep the figures."""
    torch.set_num_threads(1)
    result: dict[str, object] = {"repeats": REPEATS}
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder), settings)
    write_result("checksums", result)


def measure(folder: Path, settings: str) -> dict[str, object]:
    """Load one generator by turns with checksums and without."""
    config = PromptConditionedLoraGeneratorConfig(
        layout=PaperSettings.load(settings).layout(), text_encoder="org/encoder"
    )
    model = PromptConditionedLoraGenerator(config)
    for part in ("with", "without"):
        model.save_pretrained(folder / part)
    (folder / "without" / checksums.CHECKSUMS_NAME).unlink()
    time.sleep(2.5)  # until the files count as settled
    contestants: dict[str, Callable[[], object]] = {
        "first": lambda: (checksums._FOUND_ALIKE.clear(), load(folder / "with")),
        "later": lambda: load(folder / "with"),
        "without": lambda: load(folder / "without"),
    }
    cost: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(REPEATS + 1):
        for name, run in contestants.items():
            before = time.process_time()
            run()
            if turn:  # the first one fills the file system's cache
                cost[name].append(time.process_time() - before)
    return {
        "bytes": (folder / "with" / "model.safetensors").stat().st_size,
        "cpu_seconds": {name: spread(seconds) for name, seconds in cost.items()},
        "first_over_without": ratio(cost["first"], cost["without"]),
        "later_over_without": ratio(cost["later"], cost["without"]),
    }


def load(folder: Path) -> PromptConditionedLoraGenerator:
    """Load it as users do."""
    found: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(folder)
    return found


if __name__ == "__main__":
    main()
