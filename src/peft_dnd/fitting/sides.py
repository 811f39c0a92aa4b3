# SPDX-License-Identifier: Apache-2.0
"""What `DnDTrainer` works with: data sets, collators and the objective, of one base or of each of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import GeneratorConfigError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.collator import DistillationCollator, ExampleCollator, ExamplesBesidePairs, PromptCheckpointCollator
from ..pairs.several_bases import CollatorOfBases, PairsOfBases
from ..text.embedding_cache import PromptEmbeddingCache
from .arguments import DnDTrainingArguments
from .inputs import as_asked
from .objective import FittingObjective, check_dataset
from .several_bases import ObjectiveOfBases, pairs_of_bases
from .task_loss import LossFunction


Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class FittingSides:
    """The data sets that a trainer is given, checked, and what makes batches and losses of them.

    Args:
        model: The generator.
        args: The training arguments.

    Attributes:
        embeddings: Gives the states of prompts.
        reading: The collator, or those of the bases, that make conditions and targets.
        eval_reading: The same for evaluation, where as many prompts are read as when the generator is used.
        collator: With the base's own examples beside, where the losses need them.
        eval_collator: The same for evaluation.
        objective: The loss.
        row_collators: Name of the rows that the base's losses are taken on -> what makes a batch of them.
    """

    row_collators: dict[str, Callable[[Sequence[Mapping[str, Any]]], Any]]
    embeddings: PromptEmbeddingCache
    reading: Any
    eval_reading: Any
    collator: Any
    eval_collator: Any
    objective: Any

    def __init__(self, model: PromptConditionedLoraGenerator, args: DnDTrainingArguments) -> None:
        self._model, self._args = model, args
        self._of_bases = {name: model.for_base(name) for name in model.config.base_names} if model.config.bases else {}

    def pairs(self, dataset: Any, what: str, prompt_pool_size: int | None = None) -> Any:
        """A data set in the form that the arguments ask for; those of several bases as one.

        Args:
            dataset: What the trainer was given.
            what: `"train_dataset"` or `"eval_dataset"`.
            prompt_pool_size: How many prompts of each task are used.

        Raises:
            GeneratorConfigError: And what `check_dataset` raises, if it is not what the generator can be fitted to.
        """
        if isinstance(dataset, PairsOfBases):
            dataset = dataset.pairs
        dataset = as_asked(dataset, self._args, self._model, prompt_pool_size)
        if not self._of_bases:
            check_dataset(self._model, self._args, dataset, what)
            return dataset
        found = pairs_of_bases(self._model, dataset, what)
        for name, pairs in found.pairs.items() if found is not None else ():
            check_dataset(self._of_bases[name], self._args, pairs, f"{what}[{name!r}]")
        return found

    def build(
        self,
        base_model: Any = None,
        loss_function: LossFunction | None = None,
        token_weight: Any = None,
        task_collator: Callable[[Sequence[Mapping[str, Any]]], Any] | None = None,
    ) -> None:
        """Make collators and objective; of several bases `base_model` and `token_weight` are dictionaries.

        Raises:
            GeneratorConfigError: If they are not, or a loss of the base's lacks a model.
            BaseModelMismatchError: If a layout does not fit its base model.
        """
        model = self._model
        self.embeddings = PromptEmbeddingCache(
            model.text_encoder, read=model.read_states, folder=self._args.prompt_states_dir
        )
        self.row_collators = {}
        parts = (loss_function, task_collator)
        if not self._of_bases:
            built = self._build_one(model, base_model, token_weight, *parts)
            self.reading, self.eval_reading, self.collator, self.eval_collator, self.objective = built
            return
        for name, given in (("base_model", base_model), ("token_weight", token_weight)):
            if given is not None and not isinstance(given, Mapping):
                raise GeneratorConfigError(
                    f"The generator has several bases: {name} must be a dictionary with one for each, "
                    f"{', '.join(map(repr, self._of_bases))}."
                )
        models, weights = base_model or {}, token_weight or {}
        of_bases = {
            name: self._build_one(one, models.get(name), weights.get(name), *parts)
            for name, one in self._of_bases.items()
        }
        collators = {name: (reading, collator) for name, (reading, _, collator, _, _) in of_bases.items()}
        eval_collators = {name: (reading, collator) for name, (_, reading, _, collator, _) in of_bases.items()}
        self.reading = self.collator = CollatorOfBases(collators)
        self.eval_reading = self.eval_collator = CollatorOfBases(eval_collators)
        self.objective = ObjectiveOfBases({name: objective for name, (*_, objective) in of_bases.items()})

    def _build_one(
        self,
        model: PromptConditionedLoraGenerator,
        base_model: Any,
        token_weight: torch.Tensor | None,
        loss_function: LossFunction | None,
        task_collator: Callable[[Sequence[Mapping[str, Any]]], Any] | None,
    ) -> tuple[PromptCheckpointCollator, PromptCheckpointCollator, Collator, Collator, FittingObjective]:
        args = self._args
        reading = PromptCheckpointCollator(
            self.embeddings,
            model.weight_tokenizer,
            num_prompts=model.config.num_prompts,
            max_length=model.config.max_prompt_length,
            encode=model.config.freeze_text_encoder,
            reads_sets=model.decoder.reads_sets,
            smallest_set=args.smallest_prompt_set,
            canonical=args.canonical_targets or args.weight_loss == "delta_weights",
        )
        # What is measured is the generator with as many prompts as it will be used with.
        eval_reading = replace(reading, smallest_set=0)
        objective = FittingObjective(model, args, base_model, loss_function, token_weight=token_weight)
        collator: Any = reading
        eval_collator: Any = eval_reading
        base = objective.task_loss
        for name, weight, kind in (
            ("examples", args.task_loss_weight, ExampleCollator),
            ("distillation", args.distillation_weight, DistillationCollator),
        ):
            if base is not None and weight > 0:
                collate = (task_collator if name == "examples" else None) or kind.for_model(base.model)
                self.row_collators[name] = collate
                collator = ExamplesBesidePairs(collator, args.task_examples, collate, name)
                eval_collator = ExamplesBesidePairs(eval_collator, args.task_examples, collate, name)
        return reading, eval_reading, collator, eval_collator, objective
