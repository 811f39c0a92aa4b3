# SPDX-License-Identifier: Apache-2.0
"""Asking everything the same questions of held-out tasks: the base in its window's ways, rivals, generated adapters.

What is asked of whom is drawn by the seed before anything is scored. Each row's scores of each kind are kept, so that
a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from language_model.rivals import Matrices, StoredLoras
from language_model.rows import (
    BOTH,
    EXAMPLES,
    IGNORED,
    Row,
    blocks,
    example_row,
    in_context,
    prompt_of,
    right,
    told_as,
)
from language_model.sampled_head import with_head
from language_model.tasks import Example, Task
from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator
from peft_dnd.fitting.adapted_base import AdaptedBase
from peft_dnd.storage.files import read_json, write_json


if TYPE_CHECKING:
    # It needs the packages that its tasks are made of.
    from language_model.parts import Part
    from language_model.world import World


KINDS = ("new_wordings", "new_combinations", "new_operations", "new_languages", "new_families", "real_text")
FEW, MANY = 4, 16
_ADAPTERS_AT_ONCE = 8


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Attributes:
        tasks: Tasks of each kind, as far as there are so many.
        rows: Test rows of each task.
        prompts: Prompts that the generator reads for one adapter, all in one wording.
    """

    tasks: int = 24
    rows: int = 16
    prompts: int = 8


@dataclass(frozen=True)
class Questions:
    """What is asked of one task.

    Attributes:
        task: The task.
        asked: Test rows that all contestants are scored on.
        choosing: Other test rows, on which its own LoRA shows whether a base like this can learn the task.
        shots: Solved examples of its train split, for the window.
        instructions: Wording, "seen" or "unseen" -> the one instruction.
        prompts: Wording -> what the generator reads: that instruction, with inputs of the train split.
        solved: How many of the shots -> way of telling the task -> the same, in the kind's wording, with these before
            each input, four at a time.
        wording: The wording that the task's kind is reported in.
    """

    task: Task
    asked: tuple[Example, ...]
    choosing: tuple[Example, ...]
    shots: tuple[tuple[str, str], ...]
    instructions: Mapping[str, str]
    prompts: Mapping[str, list[str]]
    wording: str
    solved: Mapping[int, Mapping[str, list[str]]] = field(default_factory=dict)

    @property
    def other(self) -> str:
        """The other wording."""
        return "seen" if self.wording == "unseen" else "unseen"


def draw_questions(
    world: World | Part, size: Size, seed: int, kinds: Sequence[str] = KINDS
) -> dict[str, list[Questions]]:
    """Draw tasks of each kind and what is asked of them.

    Kinds of fewer than two tasks are left out: there is no other task's prompts to hold them against.
    """
    found = {}
    for kind in kinds:
        tasks = sorted(world.of(kind), key=lambda task: _chance(seed, kind, task.name).random())[: size.tasks]
        if len(tasks) > 1:
            found[kind] = [_questions_of(task, kind, size, seed) for task in tasks]
    return found


def _questions_of(task: Task, kind: str, size: Size, seed: int) -> Questions:
    chance = _chance(seed, "rows", task.name)
    test = chance.sample(task.test, len(task.test))
    asked, rest = test[: size.rows], test[size.rows : 2 * size.rows]
    shots = chance.sample(task.train, min(MANY, len(task.train)))
    instructions = {wording: chance.choice(task.instructions(wording)) for wording in ("seen", "unseen")}
    inputs = [one.input for one in chance.sample(task.train, min(size.prompts, len(task.train)))]
    wording = "unseen" if kind == "new_wordings" else "seen"
    solved = [(shot.input, shot.output) for shot in shots]
    return Questions(
        task=task,
        asked=tuple(asked),
        choosing=tuple(rest or asked),
        shots=tuple(solved),
        instructions=instructions,
        prompts={wording: [prompt_of(told, text) for text in inputs] for wording, told in instructions.items()},
        wording=wording,
        solved={
            count: {way: _with_solved(way, instructions[wording], solved[:count], inputs) for way in (EXAMPLES, BOTH)}
            for count in (FEW, MANY)
        },
    )


def _with_solved(way: str, instruction: str, shots: Sequence[tuple[str, str]], inputs: Sequence[str]) -> list[str]:
    """Prompts with four of the shots each, in an order that turns from prompt to prompt."""
    return [told_as(way, instruction, _turned(shots, number)[:FEW], text) for number, text in enumerate(inputs)]


def _turned(shots: Sequence[tuple[str, str]], number: int) -> Sequence[tuple[str, str]]:
    # Of four, by one; of sixteen, by as many as a prompt has, and by one more each time round.
    by = number if len(shots) <= FEW else number * FEW + number * FEW // len(shots)
    by %= max(1, len(shots))
    return [*shots[by:], *shots[:by]]


def _chance(*salt: object) -> random.Random:
    return random.Random(hashlib.sha256("\x1f".join(map(str, salt)).encode()).hexdigest())


@dataclass(frozen=True)
class Contest:
    """Who is asked.

    Attributes:
        model: The base.
        tokenizer: Its tokenizer.
        generator: The generator.
        own_layout: Of the tasks' own LoRAs.
        own: The own LoRAs of all tasks that are asked; like those below, only where their rows are wanted.
        multi_task: The LoRA for all training tasks, key -> shape.
        multi_task_layout: Its layout.
        mean_of: Training tasks whose own LoRAs' mean is asked as well.
    """

    model: nn.Module
    tokenizer: Any
    generator: PromptConditionedLoraGenerator
    own_layout: AdapterLayout
    own: StoredLoras | None = None
    multi_task: Matrices = field(default_factory=dict)
    multi_task_layout: AdapterLayout | None = None
    mean_of: Sequence[str] = ()

    @cached_property
    def _base(self) -> nn.Module:
        return with_head(self.model)

    @cached_property
    def own_base(self) -> AdaptedBase:
        return AdaptedBase(self._base, self.own_layout)

    @cached_property
    def multi_task_base(self) -> AdaptedBase:
        assert self.multi_task_layout is not None
        return AdaptedBase(self._base, self.multi_task_layout)

    @cached_property
    def generated_base(self) -> AdaptedBase:
        return AdaptedBase(self._base, self.generator.config.adapter_layout)

    @cached_property
    def mean_lora(self) -> Matrices:
        assert self.own is not None
        return self.own.mean(self.mean_of)


# What stands before the input in the base's window.
Window = Callable[[Questions, str], str]


def raw(asked: Questions, text: str) -> str:
    return text


def instructed(asked: Questions, text: str) -> str:
    return in_context(asked.instructions[asked.wording], [], text)


def otherwise_instructed(asked: Questions, text: str) -> str:
    return in_context(asked.instructions[asked.other], [], text)


def after_few(asked: Questions, text: str) -> str:
    return in_context(None, asked.shots[:FEW], text)


def after_many(asked: Questions, text: str) -> str:
    return in_context(None, asked.shots, text)


def instructed_after_few(asked: Questions, text: str) -> str:
    return in_context(asked.instructions[asked.wording], asked.shots[:FEW], text)


@dataclass(frozen=True)
class Entry:
    """A row of the table: whose weights, and what is in the window.

    Attributes:
        adapter: "none", "own", "mean", "multi_task", or "generated".
        window: What the base reads.
        prompts: For generated ones the prompts: "wording", "other" wording, or those of "another task".
        solved: How many solved examples the prompts draw on; 0: they have none.
        choosing: Whether it is asked the choosing rows rather than the scored ones.
    """

    adapter: str
    window: Window = raw
    prompts: str = "wording"
    solved: int = 0
    choosing: bool = False


# The protocol's own keys where it has them. `generated` and `shuffled` see the raw input: internalised use.
ENTRIES: dict[str, Entry] = {
    "base": Entry("none"),
    "base_instruction": Entry("none", instructed),
    "in_context": Entry("none", after_few),
    "in_context_16": Entry("none", after_many),
    "in_context_instruction": Entry("none", instructed_after_few),
    "average_weights": Entry("mean"),
    "multi_task": Entry("multi_task", instructed),
    "multi_task_other_wording": Entry("multi_task", otherwise_instructed),
    "generated": Entry("generated"),
    "generated_other_wording": Entry("generated", raw, "other"),
    "generated_beside": Entry("generated", instructed),
    "shuffled": Entry("generated", raw, "another task"),
    "trained": Entry("own"),
    "choosing": Entry("own", choosing=True),
}
# Of generators that were fitted on prompts with solved examples; the base's rows in context have the same ones.
WITH_EXAMPLES: dict[str, Entry] = {
    "generated_4_examples": Entry("generated", raw, EXAMPLES, FEW),
    "generated_4_examples_told": Entry("generated", raw, BOTH, FEW),
    "generated_16_examples": Entry("generated", raw, EXAMPLES, MANY),
    "generated_16_examples_told": Entry("generated", raw, BOTH, MANY),
    "shuffled_4_examples": Entry("generated", raw, "another task", FEW),
}


def score_all(
    contest: Contest, questions: Mapping[str, Sequence[Questions]], folder: Path, keys: Sequence[str] = tuple(ENTRIES)
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score every entry on every kind, or read what an earlier run has left.

    Returns:
        Kind -> entry -> `"scores"`: task -> 0 or 1 for each row; `"tokens_read"`: how many the base reads for a
        question, before its answer; `"seconds"`; and for generated adapters `"seconds_an_adapter"`.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in questions}
    waiting = [(kind, key) for kind in questions for key in keys]
    for kind, key in tqdm(waiting, desc="Judging", unit="row"):
        path = folder / kind / f"{key}.json"
        if not path.is_file():
            write_json(path, _score(contest, (ENTRIES | WITH_EXAMPLES)[key], questions[kind]))
        found[kind][key] = read_json(path)
    return found


def _score(contest: Contest, entry: Entry, questions: Sequence[Questions]) -> dict[str, Any]:
    began = time.perf_counter()
    rows = [
        [
            example_row(contest.tokenizer, entry.window(asked, one.input), one.output)
            for one in (asked.choosing if entry.choosing else asked.asked)
        ]
        for asked in questions
    ]
    costs: dict[str, Any] = {}
    scores = _scores(contest, entry, questions, rows, costs)
    read = [sum(label == IGNORED for label in row["labels"]) for of in rows for row in of]
    return {
        "scores": {asked.task.name: list(map(int, of)) for asked, of in zip(questions, scores, strict=True)},
        "tokens_read": round(sum(read) / len(read), 1),
        "seconds": round(time.perf_counter() - began, 2),
        **costs,
    }


def _scores(
    contest: Contest,
    entry: Entry,
    questions: Sequence[Questions],
    rows: Sequence[Sequence[Row]],
    costs: dict[str, Any],
) -> list[list[bool]]:
    if entry.adapter == "none":
        return [of for some in blocks(rows, _ADAPTERS_AT_ONCE) for of in right(contest.own_base, None, some)]
    if entry.adapter == "mean":
        return _with_one(contest.own_base, contest.mean_lora, rows)
    if entry.adapter == "multi_task":
        return _with_one(contest.multi_task_base, contest.multi_task, rows)
    found: list[list[bool]] = []
    for numbers in blocks(range(len(questions)), _ADAPTERS_AT_ONCE):
        some = [rows[number] for number in numbers]
        if entry.adapter == "own":
            assert contest.own is not None
            matrices = contest.own.stacked([questions[number].task.name for number in numbers])
            found += right(contest.own_base, matrices, some)
        else:
            prompts = [prompts_for(entry, questions, number) for number in numbers]
            found += right(contest.generated_base, generated(contest, prompts, costs), some)
    if "seconds_an_adapter" in costs:
        costs["seconds_an_adapter"] = round(costs["seconds_an_adapter"] / len(questions), 4)
    return found


def _with_one(base: AdaptedBase, matrices: Matrices, rows: Sequence[Sequence[Row]]) -> list[list[bool]]:
    """All tasks' rows with the same adapter."""
    found: list[list[bool]] = []
    for some in blocks(rows, _ADAPTERS_AT_ONCE):
        together = iter(right(base, {k: v[None] for k, v in matrices.items()}, [[r for of in some for r in of]])[0])
        found += [[next(together) for _ in of] for of in some]
    return found


def prompts_for(entry: Entry, questions: Sequence[Questions], number: int) -> list[str]:
    """The prompts that a task's adapter is generated from: its own in one wording, or another task's."""
    asked = questions[number]
    if entry.prompts == "another task":
        other = another(questions, number)
        return other.solved[entry.solved][EXAMPLES] if entry.solved else other.prompts[other.wording]
    if entry.solved:
        return asked.solved[entry.solved][entry.prompts]
    return asked.prompts[asked.wording if entry.prompts == "wording" else asked.other]


def another(questions: Sequence[Questions], number: int) -> Questions:
    """The next task whose operation is another, or simply the next."""
    later = [*questions[number + 1 :], *questions[:number]]
    mine = questions[number].task.operation.name
    return next((one for one in later if one.task.operation.name != mine), later[0])


def generated(contest: Contest, prompts: Sequence[list[str]], costs: dict[str, Any]) -> Matrices:
    """An adapter for each list of prompts, key -> (B, *shape); what they cost is added to what is given."""
    began = time.perf_counter()
    adapters = [contest.generator.generate_adapter(lines) for lines in prompts]
    costs["seconds_an_adapter"] = costs.get("seconds_an_adapter", 0.0) + time.perf_counter() - began
    states = [adapter.state_dict() for adapter in adapters]
    costs["bytes_an_adapter"] = sum(value.nbytes for value in states[0].values())
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}
