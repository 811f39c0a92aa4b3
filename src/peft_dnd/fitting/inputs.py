# SPDX-License-Identifier: Apache-2.0
"""What `DnDTrainer` is given: of the right kind, in the form that is asked for, in an order drawn for each epoch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ..errors import GeneratorConfigError, PairsFolderError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.mixtures import MixtureCollator
from .arguments import DnDTrainingArguments


# An item that comes again within an epoch is that of an epoch which is never reached.
EPOCHS_APART = 2**24


class EpochSampler(Sampler[tuple[int, int]]):
    """All indices of a data set in random order, each with the number of the epoch.

    With the epoch in hand the data set can draw anew at every visit and needs no state of its own, whatever process it
    lives in.

    Args:
        size: Length of the data set.
        seed: Seed of the order; each epoch has its own.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        epoch = self.epoch
        return ((epoch, i) for i in torch.randperm(self.size, generator=order).tolist())


class TemperedSampler(EpochSampler):
    """As many items as the data set has, of each task in proportion to a power of how many it has.

    With exponent 1 that is the data set itself, with 0 all tasks come alike; between them rare tasks come more often
    than they would, and frequent ones less, as languages do in XLM (arXiv 1901.07291, section 3.1). A task's items
    come in random order, all of them before one comes again; when it does, it has another seed.

    Tasks that are replayed get a share of their own, in which all are alike; then there are as many items more.

    Args:
        tasks: The task of each item of the data set.
        exponent: From 0 to 1.
        seed: As for [`EpochSampler`].
        sizes: How many each task has, where that is not the number of its items.
        replayed: Which tasks are replayed.
        share: The share of the items that is theirs, less than 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        exponent: float,
        seed: int,
        *,
        sizes: Mapping[str, int] | None = None,
        replayed: Collection[str] = (),
        share: float = 0.0,
    ) -> None:
        others = sum(task not in replayed for task in tasks)
        super().__init__(round(others / (1 - share)) if replayed else len(tasks), seed)
        items: dict[str, list[int]] = {}
        for number, task in enumerate(tasks):
            items.setdefault(task, []).append(number)
        self._items = [torch.tensor(numbers) for numbers in items.values()]
        counted = [len(numbers) if sizes is None else sizes[task] for task, numbers in items.items()]
        weights = torch.tensor(counted, dtype=torch.float64) ** exponent
        if replayed:
            again = torch.tensor([task in replayed for task in items])
            weights = torch.where(again, share / again.sum(), (1 - share) * weights / weights[~again].sum())
        self._bounds = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0) / weights.sum() * self.size])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        # Rounded so that in the mean over epochs each task has just its share, and all together are of the size.
        bounds = (self._bounds + torch.rand((), generator=draw, dtype=torch.float64)).floor().long()
        drawn = []
        for items, count in zip(self._items, bounds.diff().tolist(), strict=True):
            for visit in range(-(-count // len(items))):
                few = items[torch.randperm(len(items), generator=draw)][: count - visit * len(items)]
                drawn += [(self.epoch + visit * EPOCHS_APART, number) for number in few.tolist()]
        return (drawn[i] for i in torch.randperm(len(drawn), generator=draw).tolist())


def rows_of_tasks(pairs: PromptCheckpointDataset, replayed: Collection[str] = ()) -> dict[str, int] | None:
    """How many examples and teacher's answers each task has; `None` where one that is not replayed has checkpoints."""
    if any(pairs.checkpoints(task) for task in pairs.tasks if task not in replayed):
        return None
    of = {task: (pairs.examples(task), pairs.distillation(task)) for task in pairs.tasks}
    return {task: sum(len(rows) for rows in some if rows is not None) for task, some in of.items()}


def check_kinds(model: object, args: object, *datasets: object) -> None:
    """Make sure that a trainer is given what it needs, and not, for instance, the name of it.

    Raises:
        GeneratorConfigError: If the model is no generator, or the arguments are not `DnDTrainingArguments`.
        PairsFolderError: If a data set is a name.
    """
    if not isinstance(model, PromptConditionedLoraGenerator):
        raise GeneratorConfigError(
            f"DnDTrainer fits a PromptConditionedLoraGenerator, got {model!r}. Build one from a configuration, or "
            "load one with PromptConditionedLoraGenerator.from_pretrained."
        )
    if not isinstance(args, DnDTrainingArguments):
        raise GeneratorConfigError(
            f"DnDTrainer needs DnDTrainingArguments, got {type(args).__name__}. They take all that TrainingArguments "
            "takes."
        )
    for dataset in datasets:
        if isinstance(dataset, (str, os.PathLike)):
            raise PairsFolderError(
                f"DnDTrainer needs a data set, got the name {str(dataset)!r}. Read the pairs folder with "
                "PromptCheckpointDataset.from_folder."
            )


def with_mixtures(
    collate: Any, dataset: Any, args: DnDTrainingArguments, model: PromptConditionedLoraGenerator
) -> Any:
    """A collator that mixes tasks before this one, if the arguments ask for it.

    Raises:
        GeneratorConfigError: If nothing can be mixed: one task, sets of one prompt, or another kind of data set.
        LayoutError: If the adapters are no plain LoRA, between which nothing is defined here.
    """
    if args.mixture_share == 0 or dataset is None:
        return collate
    if not isinstance(dataset, PromptCheckpointDataset) or model.config.num_prompts < 2:
        raise GeneratorConfigError(
            "mixture_share above 0 needs a PromptCheckpointDataset and a generator that reads at least 2 prompts; got "
            f"{type(dataset).__name__} and num_prompts={model.config.num_prompts}. Set mixture_share=0."
        )
    model.config.adapter_layout.check_plain_lora("A mixture of tasks")
    return MixtureCollator(collate, dataset, args.mixture_share)


def use_one_gpu(args: DnDTrainingArguments) -> None:
    """Have one process use one GPU, as transformers does with a model that lies on several.

    Otherwise `Trainer` wraps the generator into `nn.DataParallel`, whose replicas have no parameters, from which a
    decoder could tell its dtype; nor could they be handed lists of examples.
    """
    if args.n_gpu > 1:
        warnings.warn(
            f"This process sees {args.n_gpu} GPUs and fits on the first of them. To use them all, start one process "
            f"for each: torchrun --nproc_per_node={args.n_gpu} fit.py. To choose one, set CUDA_VISIBLE_DEVICES.",
            stacklevel=3,
        )
        args._n_gpu = 1


def as_asked(
    dataset: Any,
    args: DnDTrainingArguments,
    model: PromptConditionedLoraGenerator,
    prompt_pool_size: int | None = None,
) -> Any:
    """A data set, or a dictionary of some, in the form that the arguments ask for, with the texts that are read."""
    if isinstance(dataset, dict):
        return {name: as_asked(one, args, model, prompt_pool_size) for name, one in dataset.items()}
    if not isinstance(dataset, PromptCheckpointDataset):
        return dataset
    config = model.config
    dataset = dataset.with_condition(config.condition_text, config.answer_ratio, prompt_pool_size=prompt_pool_size)
    return dataset.with_canonical_factors() if args.canonical_targets else dataset
