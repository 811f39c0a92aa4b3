# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What generated adapters are worth on held-out tasks, always beside what they must be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch

from .adapter import GeneratedAdapter
from .modeling import PromptConditionedLoraGenerator
from .text_encoder import TextEncoder


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
    adapters = generator.generate_adapters(prompts, seed=seed)
    tasks = list(adapters)
    result = {"score": fmean(scorer(task, adapters[task]) for task in tasks)}
    if len(tasks) > 1:
        others = [*tasks[1:], tasks[0]]
        result["shuffled_score"] = fmean(scorer(task, adapters[o]) for task, o in zip(tasks, others, strict=True))
    return result


def nearest_tasks(
    encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], shelf: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """For each task, the one on the shelf whose prompts are most like its own: what a user would pick by hand.

    Args:
        encoder: A text encoder.
        prompts: Task -> its prompts.
        shelf: The tasks to choose from -> their prompts.

    Returns:
        Task -> the task on the shelf whose mean sentence embedding has the largest cosine with its own.
    """
    names = list(shelf)
    available = torch.stack([_mean_embedding(encoder, shelf[name]) for name in names])
    return {task: names[int((available @ _mean_embedding(encoder, own)).argmax())] for task, own in prompts.items()}


def _mean_embedding(encoder: TextEncoder, prompts: Sequence[str]) -> torch.Tensor:
    return torch.nn.functional.normalize(encoder.encode_sentences(prompts).mean(0), dim=0)
