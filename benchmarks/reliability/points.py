# SPDX-License-Identifier: Apache-2.0
"""What is known of one generated adapter of a held-out task: its scores without labels, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.text.out_of_distribution import PromptReference, read_points


# A task on which the best that is known is hardly above the base has no gap of which a share could be closed.
LEAST_GAP = 0.1


@dataclass(frozen=True)
class Point:
    """One adapter of one held-out task.

    Attributes:
        task: The task.
        kind: In which way it is new, or what was done to its prompts.
        score: The out-of-distribution score.
        threshold: Above which score prompts of so many count as unlike the fitted tasks'.
        agreement: Cosine between what the two halves of the prompts change of the mean adapter.
        base: Accuracy of the untouched base.
        generated: Accuracy with the generated adapter.
        trained: Accuracy with the task's own adapter.
    """

    task: str
    kind: str
    score: float
    threshold: float
    agreement: float
    base: float
    generated: float
    trained: float

    @property
    def share(self) -> float | None:
        """Share of the gap between the base and the task's own adapter that the generated one closes."""
        gap = self.trained - self.base
        return (self.generated - self.base) / gap if gap >= LEAST_GAP else None


def score_of(generator: PromptConditionedLoraGenerator, prompts: Sequence[str]) -> tuple[float, float]:
    """The score of prompts, and the threshold for so many."""
    reference = generator.prompt_reference
    assert isinstance(reference, PromptReference)
    points = read_points(*generator.encode_prompts(prompts))
    return reference.score(points), reference.threshold(len(points))


def agreement_of(
    write: Callable[[Sequence[str]], GeneratedAdapter], prompts: Sequence[str], mean: dict[str, torch.Tensor]
) -> float:
    """How alike the adapters of the two halves of the prompts are: their cosine, the mean adapter taken off."""
    halves = [write(half).state_dict() for half in (prompts[0::2], prompts[1::2])]
    flat = [torch.cat([(half[key] - mean[key]).flatten() for key in sorted(mean)]) for half in halves]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def mean_adapter(generator: PromptConditionedLoraGenerator) -> dict[str, torch.Tensor]:
    """The mean training adapter, as the generator's normalisation holds it."""
    return generator.weight_tokenizer.decode(generator.normalization.mean.detach().cpu().float())
