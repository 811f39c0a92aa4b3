# SPDX-License-Identifier: Apache-2.0
"""Collators, which make batches of a data set's items: prompts drawn, checkpoints as grids, examples stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..adapters.factors import interpolated_adapter
from ..adapters.tokenizer import WeightTokenizer
from ..errors import PairsFolderError
from ..storage.progress import with_progress
from ..text.embedding_cache import PromptEmbeddingCache
from ..text.prompts import draw_prompt_set, select_prompts
from ..text.token_states import TokenStates
from .dataset import PromptCheckpointDataset
from .mixtures import PARTNER, own_part


_LABEL_PADDING = -100


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
      all are without there is no `"target_tokens"`;
    - `"replayed"`: (B,), bool, only where items of earlier tasks that are held against weights are in the batch.

    Args:
        embeddings: Gives the states of a task's prompts.
        weight_tokenizer: Makes the grids.
        num_prompts: N.
        max_length: L.
        encode: Whether to give states. A text encoder that is being fitted too has to read the prompts anew each time.
        reads_sets: Whether the decoder reads sets.
        smallest_set: For such a decoder: if at least 1, each item draws anew how many prompts, from this many to N.
        canonical: Whether what lies between two adapters, for a mixture of their tasks, is given in canonical factors.
    """

    embeddings: PromptEmbeddingCache
    weight_tokenizer: WeightTokenizer
    num_prompts: int
    max_length: int
    encode: bool = True
    reads_sets: bool = False
    smallest_set: int = 0
    canonical: bool = False
    # A cache tells pools apart by their whole text, which takes time; the same object comes again with every batch.
    _known: dict[int, tuple[Sequence[str], TokenStates]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items."""
        chosen = [self._choose_of_both(item) for item in items]
        batch = self._targets([self._target(item, parts) for item, parts in zip(items, chosen, strict=True)])
        replayed = torch.tensor([item.get("replayed", False) for item in items])
        if replayed.any():
            batch["replayed"] = replayed
        if not self.encode:
            batch["prompts"] = [[part["prompts"][k] for part, c in parts for k in c.tolist()] for parts in chosen]
            return batch
        selected = [self._select(parts) for parts in chosen]
        batch["condition_states"] = pad_sequence([states for states, _ in selected], batch_first=True)
        batch["condition_mask"] = pad_sequence([mask for _, mask in selected], batch_first=True)
        return batch

    def _targets(self, adapters: Sequence[dict[str, torch.Tensor] | None]) -> dict[str, Any]:
        has_target = torch.tensor([adapter is not None for adapter in adapters])
        if not has_target.any():
            return {"has_target": has_target}
        grids = torch.zeros(len(adapters), *self.weight_tokenizer.grid_shape, dtype=torch.float32)
        for adapter, grid in zip(adapters, grids, strict=True):
            if adapter is not None:
                self.weight_tokenizer.encode(adapter, out=grid)
        return {"target_tokens": grids} if has_target.all() else {"target_tokens": grids, "has_target": has_target}

    def _choose_of_both(self, item: dict[str, Any]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Of an item, and its partner if it is a mixture, the prompts that are read."""
        chosen = self._choose(item)
        own = own_part(item, len(chosen))
        if own == len(chosen):
            return [(item, chosen)]
        partner = item[PARTNER]
        others = select_prompts(len(partner["prompts"]), len(chosen) - own, partner["seed"])
        return [(item, chosen[:own]), (partner, others)]

    def _target(
        self, item: dict[str, Any], parts: list[tuple[dict[str, Any], torch.Tensor]]
    ) -> dict[str, torch.Tensor] | None:
        found: dict[str, torch.Tensor] | None = item["state_dict"]
        if len(parts) == 1 or found is None:
            return found
        own, others = (len(chosen) for _, chosen in parts)
        other = item[PARTNER]["state_dict"]
        layout = self.weight_tokenizer.layout
        return interpolated_adapter(layout, found, other, own / (own + others), canonical=self.canonical)

    def _select(self, parts: list[tuple[dict[str, Any], torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        both = [self._states(i["task"], i["prompts"]).select(chosen, self.max_length) for i, chosen in parts]
        states, masks = zip(*both, strict=True)
        return torch.cat(states), torch.cat(masks)

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


@dataclass
class ExampleCollator:
    """Makes rows of examples into a batch of tensors, filled up on the right where their lengths differ.

    `labels` are filled with -100, `input_ids` with the padding token, all else with 0; where `input_ids` differ in
    length and the rows bring no `attention_mask`, there is one in the batch.

    Args:
        pad_token_id: The base's padding token. What it is does not matter where an attention mask covers it.
    """

    pad_token_id: int = 0

    @classmethod
    def for_model(cls, model: torch.nn.Module) -> ExampleCollator:
        """One that fills up with a model's own padding token, if it has one."""
        token = getattr(getattr(model, "config", None), "pad_token_id", None)
        return cls(token if isinstance(token, int) and token >= 0 else 0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Raises:
            PairsFolderError: If the rows do not belong together, or hold what cannot become a tensor.
        """
        names = list(rows[0])
        for row in rows:
            if row.keys() != rows[0].keys():
                raise PairsFolderError(f"Examples of one task must have the same fields: {names} and {list(row)}.")
        batch = {name: self._stack(name, [row[name] for row in rows]) for name in names}
        lengths = [len(row["input_ids"]) for row in rows] if "input_ids" in names else []
        if len(set(lengths)) > 1 and "attention_mask" not in names:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = mask.long()
        return batch

    def _stack(self, name: str, values: list[Any]) -> torch.Tensor:
        filling = {"labels": _LABEL_PADDING, "input_ids": self.pad_token_id}.get(name, 0)
        if all(isinstance(value, list) for value in values):
            longest = max(map(len, values))
            values = [value + [filling] * (longest - len(value)) for value in values]
        try:
            return torch.tensor(values)
        except (TypeError, ValueError) as error:
            raise PairsFolderError(
                f"The field {name!r} of the examples cannot become a tensor ({error}). Write numbers or lists of "
                "numbers, or pass DnDTrainer a task_collator(rows) that makes the base's batch of such rows."
            ) from error


class DistillationCollator(ExampleCollator):
    """Makes distilled rows into a batch: as [`ExampleCollator`], with the top tokens of all answer tokens in a row.

    Beside the padded `input_ids`, `labels` and `attention_mask` there are `top_tokens`, (P, k) int64, and
    `top_log_probs`, (P, k) float32, for the P labelled positions of the batch, row by row; none where the teacher's
    answers alone were kept.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Raises:
            PairsFolderError: If the rows do not belong together, or a position lacks its top tokens.
        """
        batch = super().__call__([{name: row[name] for name in row if not name.startswith("top_")} for row in rows])
        if not any("top_tokens" in row for row in rows):
            return batch
        try:
            tokens = torch.tensor([top for row in rows for top in row["top_tokens"]])
            log_probs = torch.tensor([top for row in rows for top in row["top_log_probs"]], dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise PairsFolderError(
                f"Distilled rows need as many top_tokens as top_log_probs for each answer token ({error!r}). Have the "
                "task distilled again, with overwrite=True."
            ) from error
        labelled = int((batch["labels"] != -100).sum())
        if not len(tokens) == len(log_probs) == labelled:
            raise PairsFolderError(
                f"Distilled rows have {labelled} answer tokens, but {len(tokens)} sets of top_tokens and "
                f"{len(log_probs)} of top_log_probs. Have the task distilled again, with overwrite=True."
            )
        return {**batch, "top_tokens": tokens, "top_log_probs": log_probs}


@dataclass
class ExamplesBesidePairs:
    """A collator that adds to each item's pair a batch of rows of its task, drawn with the item's seed.

    The batch of pairs gets one more entry of that name: a list of B batches, one for each item, `None` for one whose
    task has no such rows.

    Args:
        pairs: The collator of the pairs.
        num_examples: How many rows an item gets; all, where its task has no more.
        collate: Rows to a batch.
        name: Which rows, `"examples"` or `"distillation"`.
    """

    pairs: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    num_examples: int
    collate: Callable[[Sequence[Mapping[str, Any]]], Any]
    name: str = "examples"

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items."""
        drawn = [None if item[self.name] is None else self._draw(item) for item in items]
        return {**self.pairs(items), self.name: [None if rows is None else self.collate(rows) for rows in drawn]}

    def _draw(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        own = own_part(item, self.num_examples)
        rows: list[dict[str, Any]] = item[self.name].draw(own, item["seed"])
        if own < self.num_examples:
            partner = item[PARTNER]
            rows = [*rows, *partner[self.name].draw(self.num_examples - own, partner["seed"])]
        return rows

    def some(self, dataset: PromptCheckpointDataset, most_tasks: int = 16, most_rows: int = 4) -> list[Any]:
        """A few rows of a few tasks from among all, each task's as a batch, always the same."""
        of_tasks = [found for task in dataset.tasks if (found := getattr(dataset, self.name)(task)) is not None]
        some = of_tasks[:: max(1, len(of_tasks) // most_tasks)][:most_tasks]
        rows = [found.draw(most_rows, seed=0) for found in some]
        return [self.collate(drawn) for drawn in rows]
