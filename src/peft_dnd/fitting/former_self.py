# SPDX-License-Identifier: Apache-2.0
"""A generator's former self: what it wrote before an update began is what it is to go on writing for earlier tasks.

Nothing need be kept of a task for that but some of its texts, and no pass of the base is needed. What a generator has
forgotten, or never knew, it does not learn from itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from ..evaluation.store_scores import written_tokens
from ..generator.modeling import PromptConditionedLoraGenerator
from ..text.embedding_cache import PromptEmbeddingCache


_MOST_MEASURED = 64


class FormerSelf(Mapping[str, torch.Tensor]):
    """Task -> the normalised tokens that a generator wrote for it when this was made, written when they are asked for.

    Args:
        generator: The generator. Its decoder is copied, and its text encoder only if that is fitted too.
        texts: Task -> its texts.
        embeddings: What the text encoder has read, if it is frozen.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        texts: Mapping[str, Sequence[str]],
        embeddings: PromptEmbeddingCache | None = None,
    ) -> None:
        shared: list[Any] = [generator.replay_store, generator.prompt_reference]
        if generator.config.freeze_text_encoder:
            shared.append(generator.text_encoder)
        known: dict[int, Any] = {id(one): one for one in shared if one is not None}
        self._generator: PromptConditionedLoraGenerator = copy.deepcopy(generator, known).eval().requires_grad_(False)
        self._texts = texts
        self._embeddings = embeddings

    def __getitem__(self, task: str) -> torch.Tensor:
        texts = self._texts[task]
        read = None if self._embeddings is None else self._embeddings.states(task, texts)
        return written_tokens(self._generator, texts, read=read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    @torch.no_grad()
    def written(self, condition: Mapping[str, Any], items: torch.Tensor) -> torch.Tensor:
        """What it writes for some items of a batch.

        Args:
            condition: What the generator's forward takes.
            items: (B,), bool: which.

        Returns:
            (R, N_w, L_w, C_w), normalised, for the R items.
        """
        chosen = {
            name: value[items] if isinstance(value, torch.Tensor) else _those(value, items)
            for name, value in condition.items()
        }
        tokens: torch.Tensor = self._generator(**chosen)
        return tokens

    def spread(self) -> float:
        """How far what it writes for tasks lies from the mean of that: mean squared distance of a normalised entry.

        Taken over up to 64 tasks, evenly from among all; 1 of a single task, and where all is written alike.
        """
        valid = self._generator.weight_tokenizer.valid_mask()
        total = squares = torch.zeros((), dtype=torch.float64)
        some = list(islice(self, 0, None, max(1, len(self) // _MOST_MEASURED)))
        for task in some:
            entries = self[task][valid].double()
            total, squares = total + entries, squares + entries.square()
        found = float((squares / len(some) - (total / len(some)).square()).mean())
        return found if found > 0 else 1.0


def _those(values: Sequence[Any], items: torch.Tensor) -> list[Any]:
    return [value for value, wanted in zip(values, items.tolist(), strict=True) if wanted]
