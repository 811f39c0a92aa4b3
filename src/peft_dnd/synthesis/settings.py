# SPDX-License-Identifier: Apache-2.0
"""`SynthesisSettings`: how prompts are written, and which of them pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import GeneratorConfigError
from ..storage.digests import texts_digest
from .filtering import CLOSEST, check_cosines


@dataclass(frozen=True)
class SynthesisSettings:
    """How prompts are written, and which of them pass.

    Attributes:
        max_new_tokens: The most tokens that a writer writes at a time.
        temperature: At which prompts are sampled.
        seed: Of what is shown and sampled.
        others: Prompts of other tasks, by name, from which this one is to be kept apart.
        closest: Above which cosine two prompts are near-duplicates.
        least_likeness: From which likeness to the seeds on a prompt is of the task; by default as the seeds have it,
            see [`PromptFilter`][peft_dnd.synthesis.PromptFilter].

    Raises:
        GeneratorConfigError: If a value is impossible.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    seed: int = 0
    others: Mapping[str, Sequence[str]] | None = None
    closest: float = CLOSEST
    least_likeness: float | None = None

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            raise GeneratorConfigError(f"Prompts are sampled at a temperature above 0, got {self.temperature!r}.")
        if self.others is not None and not isinstance(self.others, Mapping):
            raise GeneratorConfigError(
                f"others must be a dictionary, task name -> its prompts; got a {type(self.others).__name__}."
            )
        check_cosines(closest=self.closest, least_likeness=self.least_likeness)

    def to_dict(self) -> dict[str, Any]:
        """The settings as the record of a synthesis keeps them, the other tasks by digests of their prompts."""
        others = {task: texts_digest(list(prompts)) for task, prompts in (self.others or {}).items()}
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "filter": {"others": others, "closest": self.closest, "least_likeness": self.least_likeness},
        }


def check_count(name: str, value: object) -> None:
    """Refuse what is no positive integer.

    Raises:
        GeneratorConfigError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GeneratorConfigError(f"{name} must be a positive integer, got {value!r}.")
