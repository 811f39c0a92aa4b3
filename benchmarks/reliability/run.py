# SPDX-License-Identifier: Apache-2.0
"""Whether the out-of-distribution score foretells how much of the gap a generated adapter will close.

    python benchmarks/reliability/run.py worked-example --output demo_output --seeds 0 1 2
    python benchmarks/reliability/run.py language-model --output FOLDER --base FOLDER [--data FOLDER ...]

The first reads what `make demo` has left for these seeds, the second what a judged run of `language_model/run.py` has.
Both write `results/reliability_<world>.json`, with every adapter's figures, and a plot. Above zero, a rank correlation
says that adapters with a lower score close more of the gap.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from figures import draw, figures_of  # noqa: E402
from points import LEAST_GAP, Point  # noqa: E402
from record import RESULTS, write_result  # noqa: E402


# The kinds of which it is counted how many tasks are above the threshold. Of training tasks some prompts are known.
KINDS = ["training", "new_wordings", "new_combinations", "new_operations", "new_families", "real_text"]


def main() -> None:
    """Measure, print and keep the figures, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["worked-example", "language-model"])
    parser.add_argument("--output", type=Path, required=True, help="what the world's run has left, with seed-N in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the runs' seeds; of the second the first")
    parser.add_argument("--base", type=Path, help="the language model")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of further tasks")
    parser.add_argument(
        "--tasks", type=int, default=60, help="tasks of a kind of which those above the threshold are counted"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    if options.world == "worked-example":
        points, extra, command = of_worked_example(options)
    else:
        points, extra, command = of_language_model(options)
    figures = figures_of(points)
    name = f"reliability_{options.world.replace('-', '_')}"
    every = [{**asdict(point), "share_of_gap_closed": point.share} for point in points]
    result = {"seeds": options.seeds, "least_gap": LEAST_GAP, **figures, **extra, "points": every}
    draw(options.world.replace("-", " "), points, figures, RESULTS / f"{name}.png")
    write_result(name, result, command)


def of_worked_example(options: argparse.Namespace) -> tuple[list[Point], dict[str, Any], str]:
    """Its points, what else is measured, and the command."""
    from reliability_of_worked_example import points_of_worked_example

    points = [p for seed in options.seeds for p in points_of_worked_example(options.output / f"seed-{seed}", seed)]
    own = figures_of([point for point in points if point.kind == "own prompts"])
    seeds = " ".join(map(str, options.seeds))
    command = f"python benchmarks/reliability/run.py worked-example --output {options.output.name} --seeds {seeds}"
    return points, {"own_prompts_alone": own}, command


def of_language_model(options: argparse.Namespace) -> tuple[list[Point], dict[str, Any], str]:
    """Its points, what else is measured, and the command."""
    from reliability_of_language_model import false_alarms, points_of_language_model

    seed = options.seeds[0]
    points, world, generator = points_of_language_model(
        options.output / f"seed-{seed}", options.base, options.data, seed
    )
    alarms = false_alarms(world, generator, KINDS, options.tasks, 8)
    command = "python benchmarks/reliability/run.py language-model --output OUTPUT --base BASE" + "".join(
        f" --data {folder.name}" for folder in options.data
    )
    return points, {"false_alarms": alarms}, f"{command} --tasks {options.tasks}"


if __name__ == "__main__":
    main()
