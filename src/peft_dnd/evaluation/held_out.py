# SPDX-License-Identifier: Apache-2.0
"""Held-out tasks and generators, as the protocol sees them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..adapters.generated_adapter import GeneratedAdapter
from ..pairs.dataset import PromptCheckpointDataset
from ..text.out_of_distribution import OutOfDistributionWarning
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import ConditionText
from ..text.prompts_and_answers import condition_texts
from .bench import AdapterSource


Texts = Mapping[str, Sequence[str]]


class AdapterGenerator(Protocol):
    """What the protocol asks of a generator; a [`PromptConditionedLoraGenerator`] is one."""

    def generate_adapter(self, prompts: Sequence[str], *, seed: int = 0) -> GeneratedAdapter:
        """Write the adapter of a task from its prompts."""
        ...


@dataclass(frozen=True)
class HeldOutTask:
    """A task whose data and adapters were used nowhere in fitting.

    Attributes:
        prompts: Its unlabelled prompts, from its training split, not from what it is scored on.
        trained_adapter: An adapter trained on the task itself, the ceiling; it may be of another layout.
        answers: The prompts' answers, one each, only for generators that read them (see
            `PromptConditionedLoraGeneratorConfig.condition_text`).
        kind: A name shared by held-out tasks that want the same of an adapter, if some do: the prompts of one are then
            no wrong prompts for another, and `shuffled` takes those of another kind.
    """

    prompts: PromptsLike
    trained_adapter: AdapterSource | None = None
    answers: PromptsLike | None = None
    kind: str | None = None


def held_out_texts(generator: AdapterGenerator, tasks: Mapping[str, HeldOutTask], *, seed: int) -> Texts:
    """The texts that a generator reads of each held-out task: its prompts, or what it is configured to read.

    Args:
        generator: The generator.
        tasks: Name -> held-out task.
        seed: Decides which prompts have their answer, for a generator that reads a mix.

    Raises:
        PromptError: If it reads answers, and a task has none.
    """
    form, answer_ratio = _reads(generator)
    return {
        name: condition_texts(
            task.prompts,
            None if form == "prompts" else task.answers,
            form,
            answer_ratio=answer_ratio,
            seed=seed,
            what=f"the prompts of task {name!r}",
        )
        for name, task in tasks.items()
    }


def training_texts(generator: AdapterGenerator, pairs: PromptCheckpointDataset | None) -> Texts:
    """The same for the training tasks; none without pairs."""
    if pairs is None:
        return {}
    form, answer_ratio = _reads(generator)
    if form != "prompts":
        pairs = pairs.with_condition(form, answer_ratio)
    return {name: pairs.prompts(name) for name in pairs.tasks}


def write_adapter(generator: AdapterGenerator, texts: Sequence[str], *, seed: int) -> GeneratedAdapter:
    """Have an adapter written from texts that are just what the generator reads, junk among them."""
    if _reads(generator)[0] != "prompts":
        texts = [ConditionText(text) for text in texts]
    with warnings.catch_warnings():
        # That they are unlike the fitted tasks is what the protocol means to find out.
        warnings.simplefilter("ignore", OutOfDistributionWarning)
        return generator.generate_adapter(list(texts), seed=seed)


def _reads(generator: AdapterGenerator) -> tuple[str, float]:
    """Which texts a generator reads, and the share of them that holds answers: its configuration's, if it has one."""
    config = getattr(generator, "config", None)
    return getattr(config, "condition_text", "prompts"), getattr(config, "answer_ratio", 0.0)
