# SPDX-License-Identifier: Apache-2.0
"""What more training tasks give on held-out ones: python benchmarks/language_model/curve.py --seed 0.

A generator for 20, for 80 and for 300 training tasks, smaller sets within larger ones, each fitted on at least as many
examples a task as that for all of them; asked the same questions as `run.py` asked, whose output folder has the
answers of the base and of the tasks' own LoRAs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base, prepare_base  # noqa: E402
from language_model.fitting import FitSettings, fit_generator  # noqa: E402
from language_model.judging import KINDS, Contest, Size, draw_questions, score_all  # noqa: E402
from language_model.options import parser_of, set_up  # noqa: E402
from language_model.parts import Part  # noqa: E402
from language_model.report import report_of  # noqa: E402
from language_model.rivals import OWN, lora_layout  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.world import build_world  # noqa: E402
from peft_dnd.storage.files import read_json  # noqa: E402


logger = logging.getLogger("language_model")

# Training tasks -> steps of fitting: 256, 120 and 68 examples a task. All 1934 tasks have 53 each in 1601 steps.
STEPS = {20: 80, 80: 150, 300: 320}
# What is held out whatever is fitted on; new wordings are of the training tasks, which differ from point to point.
HELD_OUT = tuple(kind for kind in KINDS if kind != "new_wordings")
ASKED = ("generated", "shuffled")
KNOWN = ("base", "in_context", "in_context_16", "trained", "choosing")


def main() -> None:
    """Fit and ask, point by point, and write the curve."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, help="what run.py left; default: its folder in --output")
    parser.add_argument("--tasks", type=int, default=Size.tasks, help="as run.py was told")
    parser.add_argument("--rows", type=int, default=Size.rows, help="as run.py was told")
    options = parser.parse_args()
    set_up(options)
    whole = options.run or options.output / f"seed-{options.seed}"
    points = {str(count): point(options, count, whole) for count in STEPS}
    report = read_json(whole / "report.json")
    points[str(report["training_tasks"])] = {
        "examples": report["examples_seen"],
        "kinds": {kind: of for kind, of in report["kinds"].items() if kind in HELD_OUT},
    }
    shown = {
        count: {**of, "kinds": {kind: brief(one) for kind, one in of["kinds"].items()}} for count, of in points.items()
    }
    command = f"python benchmarks/language_model/curve.py --seed {options.seed} --tasks {options.tasks}"
    write_result(f"language_model_curve_seed_{options.seed}", {"points": shown}, f"{command} --rows {options.rows}")


def point(options: argparse.Namespace, count: int, whole: Path) -> dict[str, Any]:
    """One point of the curve: a generator for so many training tasks, and what it gives on held-out ones."""
    base = prepare_base(options.base or options.output / "base")
    world = build_world(options.seed, options.data)
    settings = replace(FitSettings(), seed=options.seed, steps=STEPS[count])
    folder = options.output / f"curve-{options.seed}-{count}"
    if not (folder / "generator" / "config.json").is_file():
        logger.info("A generator for %d training tasks, %d steps", count, settings.steps)
        fit_generator(folder, base, Part(world, training=count).of("training"), settings)
    model, tokenizer = load_base(base, torch.bfloat16)
    contest = Contest(
        model=model,
        tokenizer=tokenizer,
        generator=load_generator(str(folder / "generator"), base),
        own_layout=lora_layout(model, OWN.rank),
    )
    questions = draw_questions(Part(world), Size(options.tasks, options.rows), options.seed, HELD_OUT)
    found = score_all(contest, questions, folder / "scores", ASKED)
    kinds = {kind: report_of(of | known(whole, kind, of["generated"]["scores"])) for kind, of in found.items()}
    examples = settings.steps * settings.tasks_a_step * settings.examples
    return {"examples": examples, "kinds": kinds}


def known(whole: Path, kind: str, asked: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What `run.py` found for the same questions."""
    found = {key: read_json(whole / "scores" / kind / f"{key}.json") for key in KNOWN}
    if found["base"]["scores"].keys() != asked.keys():
        sys.exit(
            f"{whole} holds the answers for other tasks of {kind} than are asked here. Pass the --seed, --data, "
            "--tasks and --rows that run.py was told."
        )
    return found


def brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the curve needs of a kind's report."""
    rows = {key: row.get("mean") for key, row in report["rows"].items() if key in (*ASKED, *KNOWN)}
    names = ("share_of_gap_closed", "conditioning_gain")
    return {"tasks": report["counted"], "rows": rows, **{name: report.get(name) for name in names}}


if __name__ == "__main__":
    main()
