# SPDX-License-Identifier: Apache-2.0
"""Which of the prompts that a writer gave are of the task, and not said already.

A prompt's place is its sentence embedding by a text encoder, of length 1; how like two are is the cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch

from ..errors import GeneratorConfigError
from ..text.encoder import TextEncoder, check_text_encoder
from ..text.prompts import check_prompts


CLOSEST = 0.95
_NEIGHBOURS = 3
_FEWEST_SEEDS = 3
_LENGTHS = 3.0
_ROWS_AT_ONCE = 256


class PromptFilter:
    """Passes prompts that are like a task's seeds and unlike one another, one after the other.

    In this order, a prompt is left out that

    - repeats a seed or one that was passed, but for case and white space;
    - is less than a third as long as the shortest seed, or more than three times as long as the longest;
    - is a near-duplicate: its cosine to a seed, or to one that was passed, is above `closest`;
    - is unlike the seeds: the mean cosine to the three nearest of them is below `least_likeness`;
    - lies nearer to the seeds of another task, by the same measure.

    Args:
        text_encoder: A text encoder, a generator's for one.
        seeds: The task's seeds. Without any, likeness is not looked at.
        others: Prompts of other tasks, by their names: the surer way to keep apart tasks that are close.
        closest: Above which cosine two prompts are near-duplicates.
        least_likeness: From which likeness on a prompt is of the task. By default that of the seed that is least like
            the rest of them, each held against the others; not looked at with fewer than three seeds.

    Attributes:
        least_likeness: What became of it; `None` if likeness is not looked at.

    Raises:
        GeneratorConfigError: If a threshold is impossible.
        PromptError: If a task among `others` has no prompts, or an empty one.
        TextEncoderError: If the encoder is none.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        seeds: Sequence[str],
        *,
        others: Mapping[str, Sequence[str]] | None = None,
        closest: float = CLOSEST,
        least_likeness: float | None = None,
    ) -> None:
        check_text_encoder(text_encoder)
        check_cosines(closest=closest, least_likeness=least_likeness)
        self._encoder = text_encoder
        self._closest = closest
        self._seeds = self._places(seeds)
        self._others = [
            self._places(check_prompts(prompts, f"the prompts of {task!r}"))
            for task, prompts in (others or {}).items()
        ]
        self._lengths = (min(map(len, seeds)) / _LENGTHS, max(map(len, seeds)) * _LENGTHS) if seeds else None
        self._known = {_bare(seed) for seed in seeds}
        self._passed = self._seeds
        self.least_likeness = self._own_likeness() if least_likeness is None else least_likeness

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """Judge prompts; those that pass count as known from then on.

        Returns:
            For each `None` if it passed, or why it was left out: "repeated", "unusual length", "near-duplicate",
            "unlike the seeds" or "nearer to another task".
        """
        places = self._places(prompts)
        return [self._judge(prompt, place) for prompt, place in zip(prompts, places, strict=True)]

    def let_pass(self, prompts: Sequence[str]) -> None:
        """Take prompts as passed, those of an earlier session for instance."""
        self._known.update(map(_bare, prompts))
        self._passed = torch.cat([self._passed, self._places(prompts)])

    def likeness(self, prompts: Sequence[str]) -> list[float]:
        """How like the seeds prompts are: the mean cosine to the three nearest."""
        return _likeness(self._places(prompts), self._seeds).tolist()

    def _judge(self, prompt: str, place: torch.Tensor) -> str | None:
        bare = _bare(prompt)
        if bare in self._known:
            return "repeated"
        if self._lengths is not None and not self._lengths[0] <= len(prompt) <= self._lengths[1]:
            return "unusual length"
        if len(self._passed) and float((self._passed @ place).max()) > self._closest:
            return "near-duplicate"
        if len(self._seeds):
            own = float(_likeness(place[None], self._seeds))
            if self.least_likeness is not None and own < self.least_likeness:
                return "unlike the seeds"
            if any(float(_likeness(place[None], other)) > own for other in self._others):
                return "nearer to another task"
        self._known.add(bare)
        self._passed = torch.cat([self._passed, place[None]])
        return None

    def _own_likeness(self) -> float | None:
        if len(self._seeds) < _FEWEST_SEEDS:
            return None
        least = []
        for start in range(0, len(self._seeds), _ROWS_AT_ONCE):
            alike = self._seeds[start : start + _ROWS_AT_ONCE] @ self._seeds.T
            alike.diagonal(start).fill_(-2.0)  # itself
            nearest = alike.topk(min(_NEIGHBOURS, len(self._seeds) - 1), -1).values
            least.append(float(nearest.mean(-1).min()))
        return min(least)

    def _places(self, prompts: Sequence[str]) -> torch.Tensor:
        if not prompts:
            return torch.zeros(0, self._encoder.sentence_embedding_size)
        with torch.no_grad():
            embeddings = self._encoder.encode_sentences(list(prompts)).detach().cpu().float()
        return torch.nn.functional.normalize(embeddings, dim=1)


def check_cosines(**given: float | None) -> None:
    """Refuse thresholds that no cosine can be held against; `None` is one that was not given.

    Raises:
        GeneratorConfigError: If there is one.
    """
    for name, value in given.items():
        if value is not None and not (isinstance(value, int | float) and -1 <= value <= 1):
            raise GeneratorConfigError(f"{name} is a cosine, from -1 to 1; got {value!r}.")


def nearness(encoder: TextEncoder, prompts: Sequence[str]) -> float | None:
    """How alike the prompts of a pool are; the lower, the more various.

    Returns:
        The median over the prompts of the cosine to the nearest other one; `None` for fewer than two prompts.
    """
    if len(prompts) < 2:
        return None
    with torch.no_grad():
        places = torch.nn.functional.normalize(encoder.encode_sentences(list(prompts)).detach().cpu().float(), dim=1)
    alike = places @ places.T
    alike.fill_diagonal_(-1.0)
    return median(alike.amax(1).tolist())


def _likeness(places: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    return (places @ seeds.T).topk(min(_NEIGHBOURS, len(seeds)), -1).values.mean(-1)


def _bare(text: str) -> str:
    return " ".join(text.casefold().split())
