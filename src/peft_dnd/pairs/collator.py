# SPDX-License-Identifier: Apache-2.0
"""Batches of pairs: prompts drawn and read, checkpoints as token grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from ..adapters.tokenizer import WeightTokenizer
from ..storage.progress import with_progress
from ..text.prompts import draw_prompt_set, select_prompts
from ..text.token_states import TokenStates
from .dataset import PromptCheckpointDataset


class PromptReader(Protocol):
    """What the collator needs of a [`PromptEmbeddingCache`]."""

    def states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        """The states of all prompts of a task."""
        ...


@dataclass
class PromptCheckpointCollator:
    """Makes batches of a [`PromptCheckpointDataset`]'s items.

    N prompts are drawn from each item's pool by [`select_prompts`], the rule by which a generator chooses among too
    many, or too few, when it is used; for a decoder that reads sets at most N, by [`draw_prompt_set`], and the places
    that are left are masked.

    A batch of B items is a dictionary of

    - `"condition_states"`: (B, N, L, C), float32, and `"condition_mask"`: (B, N, L), bool, true where there is a
      token; or, without `encode`, `"prompts"`: B lists of N strings;
    - `"target_tokens"`: (B, N_w, L_w, C_w), float32, the checkpoints as token grids, as they are: not normalised;
    - `"has_target"`: (B,), bool, only where items without a checkpoint are in the batch: their grids are zero, and if
      all are without there is no `"target_tokens"`.

    Args:
        embeddings: Gives the states of a task's prompts.
        weight_tokenizer: Makes the grids.
        num_prompts: N.
        max_length: L.
        encode: Whether to give states. A text encoder that is being fitted too has to read the prompts anew each time.
        reads_sets: Whether the decoder reads sets.
        smallest_set: For such a decoder: if at least 1, each item draws anew how many prompts, from this many to N.
    """

    embeddings: PromptReader
    weight_tokenizer: WeightTokenizer
    num_prompts: int
    max_length: int
    encode: bool = True
    reads_sets: bool = False
    smallest_set: int = 0
    # A cache tells pools apart by their whole text, which takes time; the same object comes again with every batch.
    _known: dict[int, tuple[Sequence[str], TokenStates]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items."""
        batch = self._targets([item["state_dict"] for item in items])
        chosen = [self._choose(item) for item in items]
        if not self.encode:
            batch["prompts"] = [[i["prompts"][k] for k in c.tolist()] for i, c in zip(items, chosen, strict=True)]
            return batch
        states = [self._states(item["task"], item["prompts"]) for item in items]
        selected = [s.select(indices, self.max_length) for s, indices in zip(states, chosen, strict=True)]
        batch["condition_states"] = pad_sequence([states for states, _ in selected], batch_first=True)
        batch["condition_mask"] = pad_sequence([mask for _, mask in selected], batch_first=True)
        return batch

    def _targets(self, adapters: Sequence[dict[str, torch.Tensor] | None]) -> dict[str, Any]:
        has_target = torch.tensor([adapter is not None for adapter in adapters])
        if not has_target.any():
            return {"has_target": has_target}
        grids = torch.zeros(len(adapters), *self.weight_tokenizer.grid_shape)
        for adapter, grid in zip(adapters, grids, strict=True):
            if adapter is not None:
                self.weight_tokenizer.encode(adapter, out=grid)
        return {"target_tokens": grids} if has_target.all() else {"target_tokens": grids, "has_target": has_target}

    def _choose(self, item: dict[str, Any]) -> torch.Tensor:
        if self.reads_sets:
            return draw_prompt_set(len(item["prompts"]), self.num_prompts, item["seed"], self.smallest_set)
        return select_prompts(len(item["prompts"]), self.num_prompts, item["seed"])

    def warm_up(self, dataset: PromptCheckpointDataset) -> None:
        """Have the prompts of all tasks read, so that no batch has to wait for it, nor each worker process do it."""
        for task in with_progress(dataset.tasks, "Reading prompts"):
            self._states(task, dataset.prompts(task))

    def states_of_tasks(self, dataset: PromptCheckpointDataset) -> Iterator[torch.Tensor]:
        """For each task the states of all tokens of its prompts, (any number, C)."""
        for task in dataset.tasks:
            yield self._states(task, dataset.prompts(task)).flat

    def _states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        if id(prompts) not in self._known:
            self._known[id(prompts)] = (prompts, self.embeddings.states(task, prompts))
        return self._known[id(prompts)][1]
