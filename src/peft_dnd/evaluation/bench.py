# SPDX-License-Identifier: Apache-2.0
"""Scoring many adapters on one base model, one after another, and leaving the base as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..errors import EvaluationError


Scorer: TypeAlias = Callable[[nn.Module, str], Sequence[float]]
# An adapter, a folder of one, or what gives one of these when it is needed.
AdapterSource: TypeAlias = GeneratedAdapter | str | os.PathLike[str] | Callable[[], "AdapterSource"]


def adapter_of(source: AdapterSource) -> GeneratedAdapter:
    """Get the adapter of a source.

    Raises:
        EvaluationError: If it is none.
        LayoutError: If a folder holds no plain LoRA adapter.
    """
    if isinstance(source, GeneratedAdapter):
        return source
    if isinstance(source, str | os.PathLike):
        return GeneratedAdapter.from_pretrained(source)
    if callable(source):
        return adapter_of(source())
    raise EvaluationError(
        f"An adapter is given as a GeneratedAdapter, its folder, or a function that returns one of these; got "
        f"{type(source).__name__}."
    )


class ScoringBench:
    """A base model on which adapters are put and scored in turn.

    Adapters of one layout are hot-swapped, so that the model is only changed for the first of them.

    Args:
        base_model: The model, without adapters. Its parameters, flags and mode are given back by `open_bench`.
        scorer: `(model, task) -> a score for each example`.
    """

    def __init__(self, base_model: nn.Module, scorer: Scorer) -> None:
        self.model = base_model
        self.scorer = scorer
        self._names: dict[AdapterLayout, str] = {}

    def score_base(self, task: str, scorer: Scorer | None = None) -> tuple[float, ...]:
        """Score the untouched base, as long as no adapter has been put on it.

        Args:
            task: The task.
            scorer: Another scorer than the bench's.

        Raises:
            EvaluationError: If there has been one, or the scorer gives no scores.
        """
        if self._names:
            raise EvaluationError("The base is scored before the first adapter is put on it.")
        return self._score(task, scorer or self.scorer)

    def score(self, adapter: GeneratedAdapter, tasks: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Score an adapter on some tasks.

        Raises:
            BaseModelMismatchError: If it does not fit the base model.
            EvaluationError: If the scorer gives no scores.
        """
        name = self._names.setdefault(adapter.layout, f"evaluated_{len(self._names)}")
        self.model = adapter.load_into(self.model, name)
        cast(PeftModel, self.model).set_adapter(name)
        return {task: self._score(task, self.scorer) for task in tasks}

    @torch.no_grad()
    def _score(self, task: str, scorer: Scorer) -> tuple[float, ...]:
        self.model.eval()
        found = scorer(self.model, task)
        try:
            scores = tuple(float(score) for score in found)
        except TypeError as error:
            raise EvaluationError(
                f"The scorer must give a sequence of numbers, one for each example; for task {task!r} it gave "
                f"{type(found).__name__}."
            ) from error
        if not scores:
            raise EvaluationError(f"The scorer gave no scores for task {task!r}.")
        return scores


@contextmanager
def open_bench(base_model: nn.Module, scorer: Scorer) -> Iterator[ScoringBench]:
    """Within this context a base model may carry adapters; afterwards it is as it was.

    Args:
        base_model: A model without adapters.
        scorer: See [`ScoringBench`].

    Raises:
        EvaluationError: If the model has adapters already: then its score is not that of the untouched base.
    """
    if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
        raise EvaluationError(
            "The base model has adapters in it already, so it is not the untouched base. Pass the model as it was "
            "loaded, or what model.unload() gives."
        )
    training = base_model.training
    flags = {name: parameter.requires_grad for name, parameter in base_model.named_parameters()}
    bench = ScoringBench(base_model, scorer)
    try:
        yield bench
    finally:
        if isinstance(bench.model, PeftModel):
            cast(Callable[[], nn.Module], bench.model.unload)()
        for name, parameter in base_model.named_parameters():
            parameter.requires_grad_(flags[name])
        base_model.train(training)
