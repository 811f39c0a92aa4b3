# SPDX-License-Identifier: Apache-2.0
"""How the hard world's generator does with prompts of one sort, with few and with many, picked and at random.

    python benchmarks/hard_world/run.py --seed 0
    python benchmarks/hard_world/prompt_sorts.py --seed 0

Works with what the first command left. All prompts are in wordings that no training task has; the questions on which
an adapter is scored are the same for all, of every sort.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import load_base  # noqa: E402
from hard_world import LANGUAGES, TYPOS, World, build_world  # noqa: E402
from record import write_result  # noqa: E402
from tasks import score  # noqa: E402

from peft_dnd import PromptConditionedLoraGenerator, select_representative  # noqa: E402
from peft_dnd.text.representative import METHODS  # noqa: E402


COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COUNT_OF_A_SORT = 64
PICKS = (1, 2, 4, 8)
RANDOM_PICKS = 5


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("hard_world_output"), help="the benchmark's folder")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = options.output / f"seed-{options.seed}"
    if not (folder / "generator" / "config.json").is_file():
        raise SystemExit(f"{folder} is not finished. Run benchmarks/hard_world/run.py --seed {options.seed} first.")
    world = build_world(options.seed)
    generator = PromptConditionedLoraGenerator.from_pretrained(folder / "generator")
    prompts = {task.name: world.prompts(task, count=max(COUNTS)) for task in world.held_out_tasks}
    result: dict[str, Any] = {
        "seed": options.seed,
        "prompts, all sorts mixed": {
            count: score_with(
                generator, world, folder, {task: _spread(texts, count) for task, texts in prompts.items()}
            )
            for count in COUNTS
        },
        f"{COUNT_OF_A_SORT} prompts of one sort": {
            sort: score_with(
                generator,
                world,
                folder,
                {task.name: world.prompts(task, sort, COUNT_OF_A_SORT) for task in world.held_out_tasks},
            )
            for sort in ("english", TYPOS, *LANGUAGES)
        },
    }
    for count in PICKS:
        result[f"{count} prompts picked of {max(COUNTS)}"] = {
            **{
                method: score_with(generator, world, folder, representative(prompts, count, method, generator))
                for method in METHODS
            },
            "at random": [
                score_with(generator, world, folder, at_random(prompts, count, pick)) for pick in range(RANDOM_PICKS)
            ],
        }
    command = f"python benchmarks/hard_world/prompt_sorts.py --seed {options.seed}"
    write_result(f"hard_world_prompts_seed_{options.seed}", result, command)


def score_with(
    generator: PromptConditionedLoraGenerator, world: World, folder: Path, prompts: dict[str, Sequence[str]]
) -> float:
    """Mean exact match on the held-out tasks of the adapters that such prompts give."""
    model, tokenizer = load_base(folder / "base")
    scores = []
    for task in world.held_out_tasks:
        model = generator.generate_adapter(prompts[task.name], seed=world.seed).load_into(model)
        scores.append(score(model, tokenizer, world.scored_examples(task)))
    return round(fmean(scores), 4)


def representative(
    prompts: dict[str, list[str]], count: int, method: str, generator: PromptConditionedLoraGenerator
) -> dict[str, Sequence[str]]:
    """Each task's prompts that stand for all of them."""
    encoder = generator.text_encoder
    return {task: select_representative(texts, count, encoder, method=method) for task, texts in prompts.items()}


def at_random(prompts: dict[str, list[str]], count: int, pick: int) -> dict[str, Sequence[str]]:
    """Some of each task's prompts."""
    return {task: random.Random(f"{pick} {task}").sample(texts, count) for task, texts in prompts.items()}


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly from all: they stand sort by sort."""
    return [texts[place * len(texts) // count] for place in range(count)]


if __name__ == "__main__":
    main()
