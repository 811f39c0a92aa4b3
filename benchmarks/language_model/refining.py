# SPDX-License-Identifier: Apache-2.0
"""A generated adapter as a start: python benchmarks/language_model/refining.py --generator FOLDER --seed 0.

Held-out tasks are asked after a few steps of training on four or sixteen labelled examples, the very ones that the
base has in its window in the rows "in context". Training starts from the generated adapter, from another task's, or
from an untrained LoRA of the same shape. Rates and steps are chosen on other held-out tasks than are asked, for each
start by itself.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base, prepare_base  # noqa: E402
from language_model.compare import above, means  # noqa: E402
from language_model.judging import (  # noqa: E402
    ENTRIES,
    FEW,
    MANY,
    Contest,
    Questions,
    Size,
    draw_questions,
    generated,
    prompts_for,
    score_all,
)
from language_model.options import parser_of, set_up  # noqa: E402
from language_model.rivals import OWN, Matrices, Training, lora_layout, train_on, untrained  # noqa: E402
from language_model.rows import blocks, example_row, right  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.sampled_head import SampledHeadBase  # noqa: E402
from language_model.world import build_world  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402


logger = logging.getLogger("language_model")

Chosen = Mapping[tuple[str, int], Training]

# Where the generated adapter leaves much to be had.
ASKED_KINDS = ("new_combinations", "new_operations", "new_languages")
KNOWN = ("base", "in_context", "in_context_16", "generated")
UNTRAINED, GENERATED, ANOTHERS = "untrained", "generated", "another task's"
STARTS = (UNTRAINED, GENERATED, ANOTHERS)
SHOTS = (FEW, MANY)
# What is chosen from, on tasks of the same kinds that are not asked: a rate and steps, then more steps at that rate.
RATES = (2e-4, 5e-4, 2e-3)
STEPS = (4, 12)
MORE_STEPS = 24
CHOOSING_TASKS = 4
_AT_ONCE = 4


class Refining:
    """Trains a few steps from a start, and asks.

    Args:
        contest: The base and the generator.
        seed: Of the draws.
    """

    def __init__(self, contest: Contest, seed: int) -> None:
        self.contest = contest
        self.seed = seed
        self.base = SampledHeadBase(contest.model, contest.generator.config.adapter_layout)

    def scores(
        self, questions: Sequence[Questions], numbers: Sequence[int], start: str, shots: int, how: Training
    ) -> dict[str, Any]:
        """Of some of a kind's tasks, task -> 0 or 1 for each of its rows; and how long a task's training took."""
        found, seconds = {}, 0.0
        for some in blocks(numbers, _AT_ONCE):
            asked = [questions[number] for number in some]
            matrices = self._start(questions, some, start)
            began = time.perf_counter()
            rows = [[example_row(self.contest.tokenizer, *shot) for shot in one.shots[:shots]] for one in asked]
            matrices = train_on(self.base, matrices, partial(list, rows), how, f"{self.seed}/refining")
            seconds += time.perf_counter() - began
            wanted = [[example_row(self.contest.tokenizer, e.input, e.output) for e in one.asked] for one in asked]
            for one, of in zip(asked, right(self.contest.generated_base, matrices, wanted), strict=True):
                found[one.task.name] = list(map(int, of))
        return {"scores": found, "seconds_a_task": round(seconds / len(numbers), 2)}

    def _start(self, questions: Sequence[Questions], numbers: Sequence[int], start: str) -> Matrices:
        if start == UNTRAINED:
            return untrained(self.base, len(numbers))
        entry = ENTRIES["generated" if start == GENERATED else "shuffled"]
        return generated(self.contest, [prompts_for(entry, questions, number) for number in numbers], {})


def main() -> None:
    """Choose, train, ask, and write the record."""
    parser = parser_of(__doc__)
    parser.add_argument("--generator", required=True, help="a fitted generator's folder or Hub id")
    parser.add_argument("--tasks", type=int, default=8, help="asked of each kind")
    parser.add_argument("--rows", type=int, default=Size.rows, help="test rows of each task")
    options = parser.parse_args()
    set_up(options)
    base = prepare_base(options.base or options.output / "base")
    model, tokenizer = load_base(base, torch.bfloat16)
    contest = Contest(
        model=model,
        tokenizer=tokenizer,
        generator=load_generator(options.generator, base),
        own_layout=lora_layout(model, OWN.rank),
    )
    world = build_world(options.seed, options.data)
    drawn = draw_questions(world, Size(options.tasks + CHOOSING_TASKS, options.rows), options.seed, ASKED_KINDS)
    folder = options.output / f"refining-{options.seed}"
    refining = Refining(contest, options.seed)
    chosen = choose_all(refining, drawn, options.tasks, folder / "choosing")
    questions = {kind: of[: options.tasks] for kind, of in drawn.items()}
    known = score_all(contest, questions, folder / "scores", KNOWN)
    refined = {kind: refine_all(refining, of, kind, chosen, folder / "scores") for kind, of in tqdm(questions.items())}
    command = f"python benchmarks/language_model/refining.py --seed {options.seed} --tasks {options.tasks}"
    write_result(f"language_model_refining_seed_{options.seed}", result_of(known, refined, chosen), command)


def kept(path: Path, found: Callable[[], Any]) -> dict[str, Any]:
    """What a file holds; where it is not there, what `found()` gives is written first."""
    if not path.is_file():
        write_json(path, found())
    return dict(read_json(path))


def name_of(start: str, shots: int) -> str:
    return f"{start.replace(' ', '-').replace(chr(39), '')}-{shots}"


def choose_all(refining: Refining, drawn: Mapping[str, Sequence[Questions]], tasks: int, folder: Path) -> Chosen:
    """How each start is trained; another task's adapter as the task's own, which it is held against."""
    chosen = {
        (start, shots): choose(refining, drawn, tasks, start, shots, folder)
        for start in (UNTRAINED, GENERATED)
        for shots in SHOTS
    }
    return chosen | {(ANOTHERS, shots): chosen[GENERATED, shots] for shots in SHOTS}


def choose(
    refining: Refining, drawn: Mapping[str, Sequence[Questions]], tasks: int, start: str, shots: int, folder: Path
) -> Training:
    """The rate and the steps that do best, over tasks of all kinds that are not asked."""

    def mean(how: Training) -> float:
        def found() -> dict[str, Any]:
            scores: dict[str, Any] = {}
            for of in drawn.values():
                numbers = range(tasks, min(tasks + CHOOSING_TASKS, len(of)))
                scores |= refining.scores(of, numbers, start, shots, how)["scores"] if numbers else {}
            return means(scores)

        right = kept(folder / f"{name_of(start, shots)}-{how.learning_rate}-{how.steps}.json", found)["mean"]
        logger.info("%s, %d examples, rate %g, %d steps: %.3f", start, shots, how.learning_rate, how.steps, right)
        return float(right)

    tried = [replace(OWN, steps=steps, rows=shots, learning_rate=rate, warm_up=1) for rate in RATES for steps in STEPS]
    best = max(tried, key=mean)
    return max(best, replace(best, steps=MORE_STEPS), key=mean)


def refine_all(
    refining: Refining, questions: Sequence[Questions], kind: str, chosen: Chosen, folder: Path
) -> dict[str, dict[str, Any]]:
    """What every start has right of a kind after its training."""
    return {
        f"{start}, {shots}": kept(
            folder / kind / f"{name_of(start, shots)}.json",
            lambda start=start, shots=shots: refining.scores(
                questions, range(len(questions)), start, shots, chosen[start, shots]
            ),
        )
        for start in STARTS
        for shots in SHOTS
    }


def result_of(known: Mapping[str, Any], refined: Mapping[str, Any], chosen: Chosen) -> dict[str, Any]:
    """Means and seconds of each row, and what training from the generated adapter is above others."""
    kinds = {}
    for kind, of in refined.items():
        rows = {key: means(one["scores"]) for key, one in (known[kind] | of).items()}
        seconds = {key: one["seconds_a_task"] for key, one in of.items()}
        over = {}
        for shots, window in zip(SHOTS, ("in_context", "in_context_16"), strict=True):
            for other in (f"{UNTRAINED}, {shots}", f"{ANOTHERS}, {shots}", window, "generated"):
                over[f"{GENERATED}, {shots} above {other}"] = above(rows[f"{GENERATED}, {shots}"], rows[other])
        kinds[kind] = {"rows": rows, "seconds_a_task": seconds, "above": over}
    return {"training": {f"{start}, {shots}": asdict(how) for (start, shots), how in chosen.items()}, "kinds": kinds}


if __name__ == "__main__":
    main()
