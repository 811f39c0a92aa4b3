# SPDX-License-Identifier: Apache-2.0
"""Fitting one generator to the pairs of several bases: as much of each in a batch, and the mean of their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ..errors import GeneratorConfigError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.several_bases import PairsOfBases
from .inputs import EPOCHS_APART, EpochSampler
from .objective import LOSSES, FittingObjective, Supervision


class SupervisionOfBases:
    """What a batch of several bases says of the adapters that should come out.

    Args:
        of_bases: Base's name -> what it says of that base's.
    """

    def __init__(self, of_bases: Mapping[str, Supervision]) -> None:
        self.of_bases = dict(of_bases)
        self._counts: dict[str, int] = {}

    def known(self, count: int, device: torch.device) -> torch.Tensor:
        """As [`Supervision.known`], base by base; to be asked after the losses, which count the items."""
        return torch.cat([self.of_bases[name].known(number, device) for name, number in self._counts.items()])

    def base_numbers(self, names: Sequence[str]) -> torch.Tensor:
        """Whose each item is: (B, 1), int64, the base's place among `names`; as `known`, after the losses."""
        places = [names.index(name) for name, number in self._counts.items() for _ in range(number)]
        return torch.tensor(places)[:, None]

    def count(self, counts: Mapping[str, int]) -> None:
        """Take how many items each base has."""
        self._counts = dict(counts)


def split_off(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Supervision | SupervisionOfBases]:
    """Divide a batch of one base or several into what forward takes and what its result is held against."""
    if "by_base" not in batch:
        return Supervision.split_off(batch)
    parts = {name: Supervision.split_off(of_base) for name, of_base in batch["by_base"].items()}
    conditions = {name: condition for name, (condition, _) in parts.items()}
    return {"by_base": conditions}, SupervisionOfBases({name: said for name, (_, said) in parts.items()})


class ObjectiveOfBases:
    """The mean of the losses of the bases in a batch, each with its own normalisation and weights of tokens.

    Args:
        objectives: Base's name -> its objective.
    """

    def __init__(self, objectives: Mapping[str, FittingObjective]) -> None:
        self.objectives = dict(objectives)

    @property
    def task_loss(self) -> Any:
        """That of any base, if one is taken."""
        return next(iter(self.objectives.values())).task_loss

    def prepare(self, pairs: PairsOfBases, some_batches: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """As [`FittingObjective.prepare`], for each base that has pairs."""
        for name, of_base in pairs.pairs.items():

            def batches(name: str = name) -> Sequence[Any]:
                return [] if some_batches is None else some_batches().get(name, [])

            self.objectives[name].prepare(of_base, batches)

    def loss(self, tokens: Mapping[str, torch.Tensor], supervision: SupervisionOfBases, step: int) -> torch.Tensor:
        """The loss of a batch in fitting; `tokens` are those of each base."""
        losses = [
            self.objectives[name].loss(of_base, supervision.of_bases[name], step) for name, of_base in tokens.items()
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def item_losses(self, tokens: Mapping[str, torch.Tensor], supervision: SupervisionOfBases) -> torch.Tensor:
        """Each item's losses, one base's after another's; see [`FittingObjective.item_losses`]."""
        supervision.count({name: len(of_base) for name, of_base in tokens.items()})
        return torch.cat(
            [
                self.objectives[name].item_losses(of_base, supervision.of_bases[name])
                for name, of_base in tokens.items()
            ]
        )

    def total(self, item_losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The mean over items of what `item_losses` gave; see [`FittingObjective.total`]."""
        assert item_losses.shape[1] == len(LOSSES)
        return next(iter(self.objectives.values())).total(item_losses, known)


class BalancedSampler(EpochSampler):
    """Items of several bases in turn, as many of one as of another.

    An epoch goes once through the items of the base that has most; the others' come again meanwhile, with other seeds.

    Args:
        samplers: The sampler of each base's items, in the order in which the bases stand in the data set.
    """

    def __init__(self, samplers: Sequence[EpochSampler]) -> None:
        super().__init__(len(samplers) * max(map(len, samplers)), 0)
        self._samplers = list(samplers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, streams = 0, []
        for sampler in self._samplers:
            streams.append(self._again_and_again(sampler, start))
            start += len(sampler)
        turns = zip(*streams, strict=True)
        return (item for _ in range(len(self) // len(streams)) for item in next(turns))

    def _again_and_again(self, sampler: EpochSampler, start: int) -> Iterator[tuple[int, int]]:
        visit = 0
        while True:
            sampler.set_epoch(self.epoch + visit * EPOCHS_APART)
            yield from ((epoch, start + number) for epoch, number in sampler)
            visit += 1


def sampler_of_bases(
    dataset: PairsOfBases, of_base: Callable[[PromptCheckpointDataset], EpochSampler]
) -> Sampler[tuple[int, int]]:
    """The sampler of several bases' pairs, of which `of_base` gives each base's own."""
    return BalancedSampler([of_base(pairs) for pairs in dataset.pairs.values()])


def pairs_of_bases(model: PromptConditionedLoraGenerator, dataset: Any, what: str) -> Any:
    """A data set for a generator of several bases, checked; for one of a single base as it is.

    Raises:
        GeneratorConfigError: If a generator of several bases is given pairs of unknown ones, or does not learn whose
            they are.
    """
    if not model.config.bases or dataset is None:
        return dataset
    known = model.config.base_names
    if not isinstance(dataset, Mapping) or not set(dataset) <= set(known):
        given = f"bases {sorted(map(str, dataset))}" if isinstance(dataset, Mapping) else type(dataset).__name__
        raise GeneratorConfigError(
            f"The generator has the bases {', '.join(map(repr, known))}; {what} must be a dictionary of such names, "
            f"each with its PromptCheckpointDataset, and is of {given}. To fit the head of one base alone, fit "
            f"generator.for_base({known[0]!r})."
        )
    lacking = [name for name in known if name not in dataset]
    if lacking and what == "train_dataset":
        raise GeneratorConfigError(
            f"{what} has no pairs of the base {lacking[0]!r}, whose adapters would become others with the trunk that "
            "all share. Give pairs of all bases, or fit the head of one alone: "
            f"generator.for_base({next(iter(dataset), lacking[0])!r})."
        )
    for name, pairs in dataset.items():
        if not isinstance(pairs, PromptCheckpointDataset):
            raise GeneratorConfigError(
                f"{what} has {pairs!r:.80} for the base {name!r}; expected a PromptCheckpointDataset."
            )
    return PairsOfBases({name: dataset[name] for name in known if name in dataset})
