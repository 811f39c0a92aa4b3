# SPDX-License-Identifier: Apache-2.0
"""Generators beside one another on many held-out tasks: python benchmarks/language_model/compare.py --generator A.

Each is asked the same questions, by its adapters alone: without rivals and without own LoRAs, so that all tasks count,
those among them that a base of this size cannot do. The first generator is what the others are held against.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base, prepare_base  # noqa: E402
from language_model.in_languages import draw_in_languages, score_in_languages  # noqa: E402
from language_model.judging import KINDS, Contest, Size, draw_questions, score_all  # noqa: E402
from language_model.options import parser_of, set_up  # noqa: E402
from language_model.rivals import OWN, lora_layout  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.world import build_world  # noqa: E402


# Of the others there are too few tasks for many, or nothing is right.
ASKED = KINDS[:4]


def main() -> None:
    """Ask each generator, and write what they have right."""
    parser = parser_of(__doc__)
    parser.add_argument("--generator", action="append", required=True, help="NAME=folder or Hub id; several times")
    parser.add_argument("--tasks", type=int, default=64, help="asked of each kind")
    parser.add_argument("--rows", type=int, default=Size.rows, help="test rows of each task")
    options = parser.parse_args()
    set_up(options)
    named = dict(one.split("=", 1) if "=" in one else (Path(one).name, one) for one in options.generator)
    found = {name: ask(options, name, where) for name, where in named.items()}
    first = next(iter(found))
    result = {
        "generators": found,
        f"above {first}": {
            name: {kind: above(of["kinds"][kind], found[first]["kinds"][kind]) for kind in of["kinds"]}
            for name, of in found.items()
            if name != first
        },
    }
    command = f"python benchmarks/language_model/compare.py --seed {options.seed} --tasks {options.tasks}"
    command += "".join(f" --generator {name}" for name in found)
    write_result(f"language_model_compared_seed_{options.seed}", result, command)


def ask(options: argparse.Namespace, name: str, generator: str) -> dict[str, Any]:
    """What one generator's adapters have right: of each kind, and from prompts in ten languages."""
    base = prepare_base(options.base or options.output / "base")
    world = build_world(options.seed, options.data)
    size = Size(options.tasks, options.rows)
    model, tokenizer = load_base(base, torch.bfloat16)
    contest = Contest(
        model=model,
        tokenizer=tokenizer,
        generator=load_generator(generator, base),
        own_layout=lora_layout(model, OWN.rank),
    )
    folder = options.output / name
    scored = score_all(contest, draw_questions(world, size, options.seed, ASKED), folder / "scores", ("generated",))
    told = score_in_languages(contest, draw_in_languages(world, size, options.seed), folder / "languages")
    return {
        "kinds": {kind: means(of["generated"]["scores"]) for kind, of in scored.items()},
        "in_languages": {language: of["accuracy"] for language, of in told["languages"].items()},
    }


def means(scores: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The mean over tasks, and that of each."""
    by_task = {task: sum(of) / len(of) for task, of in scores.items()}
    return {"tasks": len(by_task), "mean": sum(by_task.values()) / len(by_task), "by_task": by_task}


def above(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """By how much one is above the other on the same tasks, with a 95% bootstrap interval over tasks."""
    differences = np.array([value - other["by_task"][task] for task, value in one["by_task"].items()])
    interval: Any = bootstrap((differences,), np.mean, rng=np.random.default_rng(0), method="percentile")
    low, high = interval.confidence_interval
    return {"value": float(differences.mean()), "over_tasks": [float(low), float(high)]}


if __name__ == "__main__":
    main()
