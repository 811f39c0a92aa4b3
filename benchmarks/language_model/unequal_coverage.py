# SPDX-License-Identifier: Apache-2.0
"""Training tasks with a hundredth of the others' examples: python benchmarks/language_model/unequal_coverage.py.

On the small part of the world a fifth of the training tasks, drawn by the seed, are rare: they have a hundredth of the
examples that the others have, and one wording of the instruction. Generators are fitted for equally many steps, and
differ in how often a rare task comes; beside them is one for which no task is rare. All are asked the same questions
of the rare tasks and of as many others, in wordings that were never fitted on, and of held-out tasks.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.compare import means  # noqa: E402
from language_model.fitting import FitSettings  # noqa: E402
from language_model.judging import Questions, Size, draw_questions, score_all  # noqa: E402
from language_model.parts import Part, cut  # noqa: E402
from language_model.small_fits import above_one, fitted, found_in, parser_of, path_of, prepared  # noqa: E402
from language_model.tasks import Task, share_of  # noqa: E402
from peft_dnd.storage.files import write_json  # noqa: E402


logger = logging.getLogger("language_model")

STEPS = 50
RARE_SHARE = 1 / 5
# Of the others a fit takes so many examples, of a rare one a hundredth of that, and prompts in one wording.
EXAMPLES, RARER, WORDINGS = 200, 100, 1
HELD_OUT = ("new_combinations", "new_operations")


@dataclass(frozen=True)
class Case:
    """What is fitted.

    Attributes:
        unequal: Whether there are rare tasks.
        sampling: The exponent by which tasks come; `None`: all alike.
    """

    unequal: bool = True
    sampling: float | None = None

    def settings(self, seed: int, steps: int) -> FitSettings:
        return replace(FitSettings(), seed=seed, steps=steps, examples_a_task=EXAMPLES, sampling=self.sampling)


# The second is what the others are held against.
DEFAULT = "unequal, tasks alike"
CASES = {
    "equal": Case(unequal=False),
    DEFAULT: Case(),
    "unequal, in proportion to examples": Case(sampling=1.0),
    "unequal, to the square root": Case(sampling=0.5),
}


def main() -> None:
    """Fit and ask what is asked for, and report on all that is there."""
    parser = parser_of(__doc__, STEPS)
    parser.add_argument("--only", choices=CASES, action="append", help="fit no others in this run")
    options = parser.parse_args()
    base, part = prepared(options)
    folder = options.output / f"unequal-coverage-{options.seed}"
    for name in options.only or CASES:
        fit_and_ask(options, part, base, folder, name)
    found = found_in(folder, list(CASES))
    result = {
        "training_tasks": len(part.of("training")),
        "rare": sorted(rare_tasks(part)),
        "steps": options.steps,
        "rows a step": FitSettings().tasks_a_step * FitSettings().examples,
        "cases": found,
        f"above {DEFAULT}": above_one(found, DEFAULT),
    }
    command = f"python benchmarks/language_model/unequal_coverage.py --seed {options.seed} --steps {options.steps}"
    write_result(f"language_model_unequal_coverage_seed_{options.seed}", result, command)


def rare_tasks(part: Part) -> set[str]:
    """The names of a fifth of the training tasks, drawn by the seed."""
    return set(_drawn(part.seed, "rare", [task.name for task in part.of("training")], RARE_SHARE))


def cut_down(part: Part) -> list[Task]:
    """The training tasks, those that are rare with a hundredth of the examples."""
    rare = rare_tasks(part)
    return [
        cut(task, max(1, min(EXAMPLES, len(task.train)) // RARER), WORDINGS) if task.name in rare else task
        for task in part.of("training")
    ]


def questions_of(part: Part, size: Size, seed: int) -> dict[str, list[Questions]]:
    """What is asked of the rare tasks, of as many others, both in unseen wordings, and of held-out tasks."""
    rare = rare_tasks(part)
    names = [task.name for task in part.of("training") if task.name not in rare]
    groups = {"rare": rare, "others": set(_drawn(seed, "others", names, len(rare) / len(names)))}
    found = {}
    for group, of in groups.items():
        some = Part(part.world, lambda task, of=of: part.keep(task) and task.name in of)  # type: ignore[misc]
        found[group] = draw_questions(some, replace(size, tasks=len(of)), seed, ("new_wordings",))["new_wordings"]
    return found | draw_questions(part, size, seed, HELD_OUT)


def fit_and_ask(options: argparse.Namespace, part: Part, base: Path, folder: Path, name: str) -> None:
    """Fit one case and ask it, unless that is done."""
    case, path = CASES[name], path_of(folder, name)
    if path.is_file():
        return
    logger.info("%s", name)
    tasks = cut_down(part) if case.unequal else part.of("training")
    contest, facts = fitted(path.parent / "fitting", base, tasks, case.settings(options.seed, options.steps))
    questions = questions_of(part, Size(), options.seed)
    scored = score_all(contest, questions, path.parent / "scores", ("generated",))
    kinds = {kind: {"generated": with_worst(rows["generated"]["scores"])} for kind, rows in scored.items()}
    write_json(path, {**facts, "kinds": kinds})


def with_worst(scores: dict[str, Sequence[int]]) -> dict[str, Any]:
    """The mean over tasks, the worst of them, and how many have no answer right."""
    found = means(scores)
    values = list(found["by_task"].values())
    return {**found, "worst": min(values), "nothing right": sum(value == 0 for value in values)}


def _drawn(seed: int, what: str, names: Sequence[str], share: float) -> list[str]:
    return sorted(names, key=lambda name: share_of(what, seed, name))[: round(share * len(names))]


if __name__ == "__main__":
    main()
