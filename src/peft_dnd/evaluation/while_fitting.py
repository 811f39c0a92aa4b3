# SPDX-License-Identifier: Apache-2.0
"""What is scored of held-out tasks while a generator is being fitted: its own adapters alone, and whether it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ..adapters.generated_adapter import GeneratedAdapter
from ..generator.modeling import PromptConditionedLoraGenerator


def score_generated(
    generator: PromptConditionedLoraGenerator,
    prompts: Mapping[str, Sequence[str]],
    scorer: Callable[[str, GeneratedAdapter], float],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Score the adapters that a generator writes for held-out tasks, from their own prompts and from another task's.

    A generator whose adapters do as well when written from the prompts of another task has not read the prompts.

    Args:
        generator: A fitted generator.
        prompts: Held-out task -> its prompts.
        scorer: `(task, adapter) -> score`; larger is better.
        seed: Seed of the choice of prompts.

    Returns:
        `score`: mean over the tasks of their own adapters' scores; `shuffled_score`, if there are two tasks or more:
        mean score of each task with the adapter of the next one.
    """
    adapters = generator.generate_adapters(prompts, seed=seed, out_of_distribution="ignore")
    tasks = list(adapters)
    result = {"score": fmean(scorer(task, adapters[task]) for task in tasks)}
    if len(tasks) > 1:
        others = [*tasks[1:], tasks[0]]
        result["shuffled_score"] = fmean(scorer(task, adapters[o]) for task, o in zip(tasks, others, strict=True))
    return result
