# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs: generated, trained on few or all examples, or replaced by examples in the context.

    python benchmarks/bench_overhead.py --seed 0 --output demo_output

Works with what `examples/worked_example/run.py` leaves in its output folder, and first makes of it what is missing.
For each held-out task an adapter is got in each way in turn, in one process, and scored. Counted are seconds; tokens
that pass through the base or the text encoder; and floating-point operations as PyTorch counts them, which no other
load on the machine changes. The one-off cost is that of collecting checkpoints on the training tasks and fitting the
generator.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from record import ratio, spread, write_result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "worked_example"))

from base import load_base
from run import ALL_SETTINGS, FITTING_SETTINGS, fit_generator, make_the_base
from stages import STAGES, Progress
from tasks import SETTINGS, collect_pairs, score, train_adapter
from world import Example, Task, World, build_world

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.evaluation import AnswerScorer
from peft_dnd.storage.files import read_json, write_json


SHOTS = (1, 16, 64, 256)
ALL = "all"
LONGEST_ANSWER = 8
FEW_STEPS = 8


@dataclass
class Cost:
    """What a piece of work took.

    Attributes:
        tokens: How many tokens went forward, padding left out; for training they go backward too.
        gflop: Floating-point operations, in thousands of millions, forward and backward.
    """

    tokens: int
    gflop: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.gflop + other.gflop)

    def times(self, number: float) -> Cost:
        """That many times this."""
        return Cost(round(self.tokens * number), self.gflop * number)

    def rounded(self) -> dict[str, float]:
        """For the record."""
        return {"tokens": self.tokens, "gflop": round(self.gflop, 3)}


class TokenCounter(TrainerCallback):
    """Counts the tokens that pass through a model while it trains."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += int(kwargs["attention_mask"].sum())


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, progress = build_world(options.seed), Progress(options.output / f"seed-{options.seed}")
    progress.check_settings(ALL_SETTINGS)
    make_the_base(world, progress)
    pairs = collect_pairs(world, progress)
    # Frozen, as in use: PyTorch's counter of operations cannot go through some views of parameters otherwise.
    generator = fit_generator(pairs, world, progress).requires_grad_(False)

    ways = get_adapters(generator, world, progress.folder)
    one_off = cost_of_one_off(generator, pairs, world, progress)
    result = {
        "seed": options.seed,
        "held_out_tasks": len(world.held_out_tasks),
        "questions_a_task": len(world.scored_examples(world.held_out_tasks[0])),
        "steps_of_training": SETTINGS["steps"],
        "an_adapter": ways,
        "one_off": one_off,
        "pays_after_tasks": {name: pays_after(one_off["together"], way, ways) for name, way in ways.items()},
        "in_context": in_context(world, progress.folder),
    }
    del result["pays_after_tasks"]["generated"]
    command = f"python benchmarks/bench_overhead.py --seed {options.seed} --output {options.output.name}"
    write_result("overhead", result, command)


def get_adapters(generator: PromptConditionedLoraGenerator, world: World, folder: Path) -> dict[str, Any]:
    """Get each held-out task's adapter in every way, in turn; accuracy, seconds and cost of each way."""
    tokenizer = load_base(folder / "base")[1]
    ways: dict[str, Callable[[Task], nn.Module]] = {
        "generated": lambda task: generator.generate_adapter(world.prompts(task), seed=world.seed).load_into(
            load_base(folder / "base")[0]
        )
    }
    for shots in (*SHOTS, ALL):
        ways[f"lora_{shots}_shots"] = lambda task, shots=shots: train(folder, world, task, shots)
    ways["generated"](world.held_out_tasks[0])  # warms up
    train(folder, world, world.held_out_tasks[0], 1, steps=2)

    # A round, all ways of one task in turn, is kept as soon as it is measured.
    path = folder / "overhead.json"
    rounds: dict[str, Any] = read_json(path) if path.is_file() else {}
    for task in world.held_out_tasks:
        if task.name not in rounds:
            rounds[task.name] = {name: _got(get, task, tokenizer, world) for name, get in ways.items()}
            write_json(path, rounds)
    seconds = {name: [of_task[name]["seconds"] for of_task in rounds.values()] for name in ways}
    accuracy = {name: [of_task[name]["accuracy"] for of_task in rounds.values()] for name in ways}
    costs = {"generated": cost_of_generating(generator, world)}
    for shots in (*SHOTS, ALL):
        costs[f"lora_{shots}_shots"] = cost_of_training(folder, world, shots)
    return {
        name: {
            "accuracy": round(fmean(accuracy[name]), 4),
            "seconds": {key: round(value, 3) for key, value in spread(seconds[name]).items()},
            "times_as_long_as_generating": ratio(seconds[name], seconds["generated"]),
            "labelled_examples": labelled(name, world),
            **costs[name].rounded(),
        }
        for name in ways
    }


def _got(get: Callable[[Task], nn.Module], task: Task, tokenizer: Any, world: World) -> dict[str, float]:
    began = time.perf_counter()
    model = get(task)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "accuracy": score(model, tokenizer, world.scored_examples(task))}


def labelled(way: str, world: World) -> int:
    """How many examples with answers a way needs."""
    if way == "generated":
        return 0
    shots = way.split("_")[1]
    return len(world.training_examples(world.held_out_tasks[0])) if shots == ALL else int(shots)


def train(
    folder: Path,
    world: World,
    task: Task,
    shots: int | str,
    *,
    steps: int = SETTINGS["steps"],
    callbacks: Sequence[TrainerCallback] = (),
) -> nn.Module:
    """Train a LoRA on some or all of a task's examples, as the worked example does on all."""
    examples = few(world, task, shots)
    settings = {**SETTINGS, "steps": steps, "batch_size": min(SETTINGS["batch_size"], len(examples))}
    return train_adapter(folder / "base", examples, world.seed, callbacks, settings)


def few(world: World, task: Task, shots: int | str) -> list[Example]:
    """Some of a task's training examples, drawn once, or all."""
    examples = world.training_examples(task)
    return examples if shots == ALL else random.Random(f"{world.seed} {task.name}").sample(examples, int(shots))


def cost_of_training(folder: Path, world: World, shots: int | str) -> Cost:
    """Of one held-out task's LoRA: operations of a few steps for all of them, tokens counted."""
    task = world.held_out_tasks[0]
    with FlopCounterMode(display=False) as counter:
        counted = TokenCounter()
        train(folder, world, task, shots, steps=FEW_STEPS, callbacks=[counted])
    return Cost(counted.tokens, counter.get_total_flops() / 1e9).times(SETTINGS["steps"] / FEW_STEPS)


def cost_of_generating(generator: PromptConditionedLoraGenerator, world: World) -> Cost:
    """Of one held-out task's adapter."""
    prompts = world.prompts(world.held_out_tasks[0])
    with FlopCounterMode(display=False) as counter:
        generator.generate_adapter(prompts, seed=world.seed)
    read = generator.encode_prompts(prompts, seed=world.seed)[1]
    return Cost(int(read.sum()), counter.get_total_flops() / 1e9)


def cost_of_one_off(
    generator: PromptConditionedLoraGenerator,
    pairs: PromptCheckpointDataset,
    world: World,
    progress: Progress,
) -> dict[str, Any]:
    """Of collecting on all training tasks, and of fitting."""
    collecting = cost_of_training(progress.folder, world, ALL).times(len(pairs.tasks))
    # The operations of a step depend on how many prompts its items draw, so they are those of several.
    first, more = (cost_of_fitting(generator, pairs, steps) for steps in (1, 1 + FEW_STEPS))
    steps = (more.gflop - first.gflop) / FEW_STEPS * FITTING_SETTINGS["max_steps"]
    reading = cost_of_reading(generator, pairs)
    fitting = Cost(reading.tokens, reading.gflop + steps)
    spent = {
        name: progress.seconds[STAGES[stage].seconds]
        for name, stage in (("collecting", "pairs"), ("fitting", "generator"))
    }
    costs = {"collecting": collecting, "fitting": fitting}
    found = {name: {"seconds": round(spent[name], 1), **cost.rounded()} for name, cost in costs.items()}
    together = {"seconds": round(sum(spent.values()), 1), **(collecting + fitting).rounded()}
    return {"training_tasks": len(pairs.tasks), **found, "together": together}


def cost_of_reading(generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset) -> Cost:
    """Of having the text encoder read the prompts of all training tasks, from those of one."""
    with FlopCounterMode(display=False) as counter:
        states = generator.text_encoder.encode_tokens(pairs.prompts(pairs.tasks[0]))
    return Cost(len(states.flat), counter.get_total_flops() / 1e9).times(len(pairs.tasks))


def cost_of_fitting(generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, steps: int) -> Cost:
    """Of the first steps of a fit like the generator's on two of its tasks, with all that comes before them."""
    fresh = PromptConditionedLoraGenerator(copy.deepcopy(generator.config), generator.text_encoder)
    with tempfile.TemporaryDirectory() as output:
        arguments = DnDTrainingArguments(
            output_dir=output,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **{**FITTING_SETTINGS, "max_steps": steps},
        )
        with FlopCounterMode(display=False) as counter:
            DnDTrainer(fresh, arguments, train_dataset=pairs.split(pairs.tasks[:2])[1]).train()
    return Cost(0, counter.get_total_flops() / 1e9)


def pays_after(one_off: dict[str, float], way: dict[str, Any], ways: dict[str, Any]) -> dict[str, float | None]:
    """After how many tasks the one-off cost is saved, against getting each task's adapter in this way."""
    generated = ways["generated"]

    def tasks(spent: float, saved: float) -> float | None:
        return round(spent / saved, 1) if saved > 0 else None  # None: never

    return {
        "by_seconds": tasks(one_off["seconds"], way["seconds"]["median"] - generated["seconds"]["median"]),
        "by_gflop": tasks(one_off["gflop"], way["gflop"] - generated["gflop"]),
    }


def in_context(world: World, folder: Path) -> dict[str, Any]:
    """What the untouched base makes of examples before each question, and what a question then costs.

    More examples than its context holds are not asked of it: for these only the tokens are counted.
    """
    model, tokenizer = load_base(folder / "base")
    questions = {task.name: _as_pairs(world.scored_examples(task)) for task in world.held_out_tasks}
    training = {task.name: _as_pairs(world.training_examples(task)) for task in world.held_out_tasks}
    plain = AnswerScorer(tokenizer, questions, max_new_tokens=LONGEST_ANSWER, normalize=str)
    found = {}
    for shots in (0, *SHOTS):
        scorer = plain.with_examples(training, shots, seed=world.seed)
        texts = [scorer.text(task, question) for task, asked in questions.items() for question, _ in asked]
        lengths = [len(ids) for ids in tokenizer(texts).input_ids]
        fits = max(lengths) + LONGEST_ANSWER <= model.config.max_position_embeddings
        found[f"{shots}_shots"] = {
            "fits_the_context": fits,
            "prompt_tokens_a_question": round(fmean(lengths), 1),
            **(_answered(scorer, model, questions, tokenizer.pad_token_id) if fits else {}),
        }
    return found


def _answered(scorer: AnswerScorer, model: nn.Module, questions: dict[str, Any], padding: int) -> dict[str, float]:
    asked = sum(map(len, questions.values()))
    with counting(model, padding) as counted:
        began = time.perf_counter()
        accuracy = fmean(fmean(scorer(model, task)) for task in questions)
        seconds = time.perf_counter() - began
    with FlopCounterMode(display=False) as counter:
        scorer(model, next(iter(questions)))
    return {
        "accuracy": round(accuracy, 4),
        "seconds_a_question": round(seconds / asked, 5),
        "tokens_a_question": round(counted[0] / asked, 1),
        "gflop_a_question": round(counter.get_total_flops() / 1e9 / (asked / len(questions)), 4),
    }


@contextmanager
def counting(model: nn.Module, padding: int) -> Iterator[list[int]]:
    """Count the tokens that pass through a model."""
    counted = [0]

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        counted[0] += int((kwargs["input_ids"] != padding).sum())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


def _as_pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    return [(example.prompt, example.answer) for example in examples]


if __name__ == "__main__":
    main()
