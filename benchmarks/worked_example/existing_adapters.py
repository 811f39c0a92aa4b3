# SPDX-License-Identifier: Apache-2.0
"""World 1 from adapters that exist already: unlike initialisations, ranks 2 to 8, three alphas.

    python examples/worked_example/run.py --seed 0
    python benchmarks/worked_example/existing_adapters.py --seed 0

Each training task gets adapters that share nothing with those of other tasks but the base: trained from seeds of their
own, saved by stock PEFT. `import_adapters` makes pairs of them, and generators are fitted with the example's settings,
to factors or to updates. They are compared on the held-out tasks with the example's own generator, whose adapters
started from one initialisation. What has been made is kept in --output: a second run starts from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import load_base  # noqa: E402
from example_generators import exact_matches, finished_example, fit, generating, new_generator  # noqa: E402
from peft import PeftModel  # noqa: E402
from record import write_result  # noqa: E402
from tasks import SETTINGS, score, train_adapter  # noqa: E402
from world import Task, World, build_world  # noqa: E402

from peft_dnd import (  # noqa: E402
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    import_adapters,
)
from peft_dnd.pairs import PairWriter  # noqa: E402
from peft_dnd.storage.files import read_json, staged_directory, write_json  # noqa: E402


RANKS = (2, 3, 4, 6, 8)
ALPHAS = (8, 16, 32)
# How pairs are made of the adapters, and what the loss is taken on.
WAYS: dict[str, dict[str, Any]] = {
    "one A of rank 16 for all": {"factors": "shared"},
    "canonical factors": {"factors": "canonical"},
    "canonical factors, loss on updates": {"factors": "canonical", "weight_loss": "delta_weights"},
    "canonical factors, turned towards their mean": {"factors": "canonical", "turned": True},
    "one A of rank 8 for all": {"factors": "shared", "rank": 8},
    "factors as they are": {"factors": "kept"},
    "one A of rank 24 for all": {"factors": "shared", "rank": 24},
}


class Bench:
    """Makes adapters, pairs of them and generators, scores these, and keeps the figures.

    Args:
        world: The world.
        folder: What the worked example made for its seed.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder / "existing"
        self.base = folder / "base"
        self.path = self.folder / "figures.json"
        self.figures: dict[str, dict[str, Any]] = read_json(self.path) if self.path.is_file() else {}

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Keep what was measured, to four places."""
        self.figures[name] = {of: round(value, 4) for of, value in figures.items()}
        write_json(self.path, self.figures)

    def adapter(self, number: int, task: Task, copy: int) -> Path:
        """Train one of a task's adapters, unless it is there, as whoever knows nothing of the others would."""
        target = self.folder / "adapters" / f"{task.name}-{copy}"
        if not target.is_dir():
            drawn = copy * len(self.world.training_tasks) + number
            settings = {**SETTINGS, "rank": RANKS[drawn % len(RANKS)], "alpha": ALPHAS[drawn % len(ALPHAS)]}
            seed = 1000 * (self.world.seed + 1) + drawn
            model = train_adapter(self.base, self.world.training_examples(task), seed, settings=settings)
            with staged_directory(target) as staged:
                model.save_pretrained(staged)
        return target

    def adapters(self, copies: int) -> dict[str, list[Path]]:
        """Each training task's adapters."""
        return {
            task.name: [self.adapter(number, task, copy) for copy in range(copies)]
            for number, task in enumerate(self.world.training_tasks)
        }

    def score_adapters(self) -> None:
        """How well the first adapter of each training task does on it, as stock PEFT loads it."""
        scores = []
        for number, task in enumerate(self.world.training_tasks):
            model, tokenizer = load_base(self.base)
            model = PeftModel.from_pretrained(model, self.adapter(number, task, 0))
            scores.append(score(model, tokenizer, self.world.scored_examples(task)))
        self.keep("adapters themselves, on their tasks", {"exact match": fmean(scores), "lowest": min(scores)})

    def measure(
        self, name: str, copies: int, *, weight_loss: str = "factors", turned: bool = False, **options: Any
    ) -> None:
        """Make pairs of the adapters, fit a generator to them and score it."""
        pools = {task.name: self.world.prompts(task) for task in self.world.training_tasks}
        pairs = self.folder / "pairs" / "-".join([str(copies), *(f"{key}-{value}" for key, value in options.items())])
        adapters = self.adapters(copies)
        began = time.process_time()
        tasks = import_adapters(adapters, pairs, prompts=pools, **options)
        seconds = time.process_time() - began
        lost = [adapter["lost_share"] for task in tasks for adapter in task.adapters]
        if turned:
            pairs = turn_towards_mean(pairs, pairs.with_name(f"{pairs.name}-turned"))
        given = PromptCheckpointDataset.from_folder(pairs)
        generator = new_generator(given, self.world.seed)
        fitted = fit(generator, given, self.folder / "fitting", self.world.seed, weight_loss=weight_loss)
        figures = {"held out": self.score(generator), "seconds of fitting": fitted}
        if tasks[0].written:
            figures["seconds of importing an adapter"] = seconds / len(lost)
        self.keep(name, {**figures, "mean share lost": fmean(lost), "largest": max(lost)})

    def score(self, generator: PromptConditionedLoraGenerator) -> float:
        """Mean exact match on the held-out tasks of what a generator writes from their prompts."""
        scores = exact_matches(self.base, self.world, self.world.held_out_tasks, generating(generator, self.world))
        return fmean(scores.values())


def turn_towards_mean(pairs: Path, target: Path, rounds: int = 50) -> Path:
    """Copy pairs of one adapter a task, with each module's factors turned so that they lie near to all tasks' mean.

    (B G)(Gᵀ A) is the same update for each orthogonal G. Each adapter's is the one that brings both factors nearest to
    the mean of the turned ones (generalised Procrustes analysis): what differs then is neither the sign nor the order
    of singular vectors.
    """
    given = PromptCheckpointDataset.from_folder(pairs)
    states = {task: given.state_dict(task) for task in given.tasks}
    for module in given.layout.modules:
        key_a, key_b = (tensor.key for tensor in module.tensors)
        a = torch.stack([state[key_a].double() for state in states.values()])
        b = torch.stack([state[key_b].double() for state in states.values()])
        mean_a, mean_b = a[0], b[0]
        for _ in range(rounds):
            u, _, vt = torch.linalg.svd(a @ mean_a.T + b.mT @ mean_b)
            turn = u @ vt
            turned_a, turned_b = turn.mT @ a, b @ turn
            mean_a, mean_b = turned_a.mean(0), turned_b.mean(0)
        for state, new_a, new_b in zip(states.values(), turned_a.float(), turned_b.float(), strict=True):
            state[key_a], state[key_b] = new_a.contiguous(), new_b.contiguous()
    shutil.rmtree(target, ignore_errors=True)
    for task, state in states.items():
        writer = PairWriter(target / task, given.prompts(task), given.layout, task=task)
        writer.begin()
        writer.add(state, 1)
        writer.close()
    return target


def main() -> None:
    """Measure each way and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    parser.add_argument("--copies", type=int, nargs="*", default=[1], help="how many adapters a task has")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="what to measure")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = finished_example(options.output, options.seed)
    bench = Bench(build_world(options.seed), folder)
    if "one initialisation" not in bench.figures:
        generator = PromptConditionedLoraGenerator.from_pretrained(folder / "generator")
        bench.keep("one initialisation", {"held out": bench.score(generator)})
    for copies in options.copies:
        for way in options.ways:
            name = f"{copies} a task: {way}"
            if name not in bench.figures:
                bench.measure(name, copies, **WAYS[way])
    if "adapters themselves, on their tasks" not in bench.figures:
        bench.score_adapters()
    command = f"python benchmarks/worked_example/existing_adapters.py --seed {options.seed}"
    facts = {"seed": options.seed, "ranks": RANKS, "alphas": ALPHAS, "figures": bench.figures}
    write_result(f"existing_adapters_seed_{options.seed}", facts, command)


if __name__ == "__main__":
    main()
