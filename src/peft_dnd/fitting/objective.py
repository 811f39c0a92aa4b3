# SPDX-License-Identifier: Apache-2.0
"""What a generator is fitted to: weight loss, task loss and distillation, by the training arguments and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.factors import delta_weight_mse
from ..adapters.method_layout import MethodLayout
from ..adapters.tokenizer import denormalized, weight_statistics
from ..decoders import PartialDecoder
from ..errors import GeneratorConfigError, LayoutError, PairsFolderError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.statistics import delta_weight_spread, task_balanced_grids, token_spread
from ..pairs.store_update import ROWS
from .arguments import DnDTrainingArguments
from .distillation import distillation_losses
from .losses import add_noise, masked_mse
from .task_loss import LossFunction, TaskLoss
from .teacher import check_teachers
from .untrained import activation_sizes, untrained_statistics


LOSSES = (
    "weight_loss",
    "mean_adapter_loss",
    "task_loss",
    "mean_adapter_task_loss",
    "distillation_loss",
    "mean_adapter_distillation_loss",
)
"""What [`FittingObjective.item_losses`] gives for each item, column by column."""

# Of the squared distance of replayed adapters, relative to how far they lie apart, beside the base's loss in nats.
# Alone, with 1 single tasks are lost, and with 100 late ones are no longer learned (benchmarks/bench_arrivals.py).
REPLAY_WEIGHT = 10.0


@dataclass(frozen=True)
class Supervision:
    """What a batch says of the adapters that should come out.

    Attributes:
        targets: (B, N_w, L_w, C_w), the checkpoints' token grids; `None` where no item has one.
        has_target: (B,), bool: which items have one; `None` if all.
        examples: For each item a batch of examples for the base model, or `None`; `None` without task loss.
        distillation: For each item a batch of what a teacher said, or `None`; `None` without distillation.
        replayed: (B,), bool: which items are replayed, and held against their targets although the others are held
            against what the base does; `None` if none.
    """

    targets: torch.Tensor | None
    has_target: torch.Tensor | None
    examples: list[Any] | None
    distillation: list[Any] | None = None
    replayed: torch.Tensor | None = None

    @classmethod
    def split_off(cls, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Supervision]:
        """Divide a collator's batch into what the generator's forward takes and what its result is held against."""
        rest = dict(batch)
        names = ("target_tokens", "has_target", "examples", "distillation", "replayed")
        return rest, cls(*(rest.pop(name, None) for name in names))

    def known(self, count: int, device: torch.device) -> torch.Tensor:
        """Which of so many items have a checkpoint, examples, and a teacher's answers: (B, 3), bool."""
        known = torch.zeros(count, 3, dtype=torch.bool, device=device)
        if self.targets is not None:
            known[:, 0] = True if self.has_target is None else self.has_target
        for column, kind in enumerate(ROWS, 1):
            rows = getattr(self, kind)
            if rows is not None:
                known[:, column] = torch.tensor([of_item is not None for of_item in rows])
        return known


class FittingObjective:
    """The loss that a generator is fitted to.

    - Weight loss on factors: the paper's weighted mean squared error on normalised tokens; see [`masked_mse`].
    - Weight loss on updates: the mean squared error of ΔW, of each module relative to the training adapters' mean
      squared distance from the mean adapter; see [`delta_weight_mse`]. The mean adapter's loss is then about 1.
    - Task loss: the base's own loss with the adapter in place; see [`TaskLoss`].
    - Distillation: how far the base with the adapter in place is from what a teacher said; see
      [`top_token_divergence`][peft_dnd.fitting.top_token_divergence].
    - In a fit on the latter two, for items that are replayed: the mean squared error on normalised tokens, relative to
      `replay_spread`.

    Args:
        generator: The generator.
        args: The training arguments.
        base_model: The frozen base, which task loss and distillation need.
        loss_function: The base's loss, where its forward gives none.
        token_weight: What each token weighs in the loss on factors, (N_w,), in place of what the arguments say.

    Raises:
        GeneratorConfigError: If task loss is asked for without a base model.
        BaseModelMismatchError: If the generator's layout does not fit the base model.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments,
        base_model: nn.Module | None = None,
        loss_function: LossFunction | None = None,
        *,
        token_weight: torch.Tensor | None = None,
    ) -> None:
        self.generator = generator
        self.args = args
        self.token_weight = token_weight
        self.module_size: torch.Tensor | None = None
        # How far the adapters of replayed tasks lie apart: their distance from what they were counts relative to that.
        self.replay_spread = 1.0
        self._own_loss = loss_function is None
        self.answers_alone = args.distillation_targets == "answers"
        # Distillation is taken on the same copy of the base.
        self.task_loss = _task_loss(generator, args, base_model, loss_function)
        self._valid_mask = generator.weight_tokenizer.valid_mask()
        self._shared = _shared_keys(generator)

    def prepare(
        self, pairs: PromptCheckpointDataset, some_batches: Callable[[], Sequence[Mapping[str, Any]]] | None = None
    ) -> None:
        """Take from the training pairs what the loss needs to know, where it is not known yet.

        That is the generator's normalisation, and what weighs tokens or modules.

        Args:
            pairs: The training pairs.
            some_batches: Gives a few batches of the base's, of several tasks, on which to see how large what goes
                through its modules is, where there are no adapters to take the normalisation from.
        """
        generator = self.generator
        if self.args.distillation_weight > 0 and self.task_loss is not None:
            check_teachers(pairs, self.task_loss.model, answers_alone=self.answers_alone)
        if not generator.normalization.fitted and generator.config.normalization != "none":
            generator.normalization.set_statistics(*self._statistics(pairs, some_batches))
        generator.normalization.fitted.fill_(True)
        if not pairs.has_checkpoints:
            return
        if self.args.weight_loss == "delta_weights":
            if self.module_size is None:
                mean = generator.weight_tokenizer.decode(generator.normalization.mean.cpu())
                self.module_size = delta_weight_spread(pairs, generator.weight_tokenizer.layout, mean)
        elif self.token_weight is None and self.args.loss_weighting != "none":
            spread = token_spread(pairs, generator.weight_tokenizer, generator.normalization)
            self.token_weight = spread.weights(self.args.loss_weighting)

    def loss(self, tokens: torch.Tensor, supervision: Supervision, step: int) -> torch.Tensor:
        """The loss of a batch in fitting.

        Args:
            tokens: (B, N_w, L_w, C_w), what the decoder wrote.
            supervision: What they are held against.
            step: The number of optimiser steps that were made.

        Returns:
            A scalar.
        """
        weight_loss, task_loss, distillation = self._weights(step)
        # In the graph whatever follows: by chance no item of a batch may have a checkpoint.
        loss = tokens.sum() * 0.0
        known = supervision.known(len(tokens), tokens.device)
        again = None if self.task_loss is None else supervision.replayed
        to_weights = known[:, 0] if again is None else known[:, 0] & ~again
        if weight_loss > 0 and supervision.targets is not None and (again is None or to_weights.any()):
            wanted = self._noisy(_those(supervision.targets, to_weights))
            loss = loss + weight_loss * self._weight_loss(_those(tokens, to_weights), wanted, self.token_weight)
        if again is not None and again.any():
            assert supervision.targets is not None, "replayed items have targets"
            distance = masked_mse(
                tokens[again], self._noisy(supervision.targets[again]), self._valid_mask.to(tokens.device)
            )
            loss = loss + REPLAY_WEIGHT * again.float().mean() * distance / self.replay_spread
        for column, (kind, weight) in enumerate(zip(ROWS, (task_loss, distillation), strict=True), 1):
            if weight > 0 and known[:, column].any():
                losses = self._row_losses(kind, tokens, getattr(supervision, kind), known[:, column])
                loss = loss + weight * losses.sum() / len(tokens)
        return loss

    def _noisy(self, targets: torch.Tensor) -> torch.Tensor:
        return add_noise(self.generator.normalization.normalize(targets), self.args.target_noise)

    @torch.no_grad()
    def item_losses(self, tokens: torch.Tensor, supervision: Supervision) -> torch.Tensor:
        """Each item's weight loss, unweighted, and task loss, beside those of the mean adapter.

        Args:
            tokens: (B, N_w, L_w, C_w).
            supervision: What they are held against.

        Returns:
            (B, 6), float32, the columns as in `LOSSES`; NaN for what there is not, which [`Supervision.known`] tells
            from the NaN that a generator which diverged gives.
        """
        targets, known = supervision.targets, supervision.known(len(tokens), tokens.device)
        losses = torch.full((len(tokens), len(LOSSES)), torch.nan, dtype=torch.float32, device=tokens.device)
        mean = torch.zeros_like(tokens)
        if targets is not None:
            target = self.generator.normalization.normalize(targets)
            for i in known[:, 0].nonzero()[:, 0].tolist():
                for column, guess in enumerate((tokens, mean)):
                    losses[i, column] = self._weight_loss(guess[i, None], target[i, None], None)
        for column, kind in enumerate(ROWS, 1):
            has = known[:, column]
            if has.any():
                both = [self._row_losses(kind, guess, getattr(supervision, kind), has) for guess in (tokens, mean)]
                losses[has, 2 * column : 2 * column + 2] = torch.stack(both, 1)
        return losses

    def total(self, item_losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The mean of what `item_losses` gave, by the weights that hold after the warm start.

        Args:
            item_losses: (B, 6), as `item_losses` gives them.
            known: (B, 3), which items have a checkpoint, examples, a teacher's answers; see [`Supervision.known`].
                The mean of each loss is over those that have what it is taken on.

        Returns:
            A scalar: NaN if a loss that counts is NaN; 0 if no item has what any loss is taken on, which a single
            batch may come to.
        """
        total = item_losses.new_zeros(())
        for column, weight in enumerate(self._weights(None)):
            has = known[:, column]
            if weight > 0 and has.any():
                total = total + weight * item_losses[has, 2 * column].mean()
        return total

    def _weights(self, step: int | None) -> tuple[float, float, float]:
        if self.task_loss is None or (step is not None and step < self.args.rebuild_steps):
            return 1.0, 0.0, 0.0
        return self.args.rebuild_weight, self.args.task_loss_weight, self.args.distillation_weight

    def _weight_loss(
        self, tokens: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None
    ) -> torch.Tensor:
        if self.args.weight_loss == "delta_weights":
            predicted, wanted = self._matrices(tokens), self._matrices(target)
            return delta_weight_mse(predicted, wanted, self.generator.weight_tokenizer.layout, self.module_size)
        weight = None if token_weight is None else token_weight.to(tokens.device)
        return masked_mse(tokens, target, self._valid_mask.to(tokens.device), weight)

    def _matrices(self, tokens: torch.Tensor, *, shared: Set[str] = frozenset()) -> dict[str, torch.Tensor]:
        """The LoRA matrices that normalised tokens stand for, each with a batch axis: of one, for the shared keys."""
        tokenizer, normalization = self.generator.weight_tokenizer, self.generator.normalization
        parts = tokenizer.split(tokens), tokenizer.split(normalization.mean), tokenizer.split(normalization.scale, 0)
        matrices = {}
        for tensor, chunks, mean, scale in zip(tokenizer.layout.tensors, *parts, strict=True):
            of_items = chunks[:1] if tensor.key in shared else chunks
            matrices[tensor.key] = tokenizer.join(tensor, denormalized(of_items, mean, scale))
        return matrices

    def row_losses(self, kind: str, matrices: Mapping[str, torch.Tensor], batches: Sequence[Any]) -> torch.Tensor:
        """What the base does on rows with adapters in place.

        Args:
            kind: `"examples"`, or `"distillation"`: what a teacher said.
            matrices: PEFT on-disk key -> (R, ...), an adapter for each batch.
            batches: R batches of such rows.

        Returns:
            (R,), float32, in nats a token.
        """
        assert self.task_loss is not None
        if kind == "examples":
            return self.task_loss.losses(matrices, batches)
        return distillation_losses(self.task_loss.base, matrices, batches, answers_alone=self.answers_alone)

    def _row_losses(self, kind: str, tokens: torch.Tensor, rows: Any, has: torch.Tensor) -> torch.Tensor:
        """The same for the items of a batch that have rows, with the adapters of their tokens; (as many,), float32."""
        batches = [of_item for of_item in rows if of_item is not None]
        return self.row_losses(kind, self._matrices(_those(tokens, has), shared=self._shared), batches)

    def _statistics(
        self, pairs: PromptCheckpointDataset, some_batches: Callable[[], Sequence[Mapping[str, Any]]] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = self.generator.weight_tokenizer
        if pairs.has_checkpoints or self.task_loss is None:
            return weight_statistics(tokenizer, task_balanced_grids(pairs, tokenizer))
        # What a loss function of the user's own does with a batch is not known.
        batches = some_batches() if some_batches is not None and self._own_loss else []
        sizes = activation_sizes(self.task_loss.model, tokenizer.layout, batches)
        return untrained_statistics(tokenizer, self.task_loss.initial_adapter(), sizes)


def _those(tensor: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Some items of a batch; of all of them no copy is made."""
    return tensor if bool(items.all()) else tensor[items]


def _shared_keys(generator: PromptConditionedLoraGenerator) -> frozenset[str]:
    """The matrices that the decoder writes alike for all prompts."""
    written = generator.decoder.written_sides if isinstance(generator.decoder, PartialDecoder) else ("A", "B")
    return frozenset(tensor.key for tensor in generator.weight_tokenizer.layout.tensors if tensor.side not in written)


def check_dataset(
    generator: PromptConditionedLoraGenerator, args: DnDTrainingArguments, dataset: Any, what: str
) -> None:
    """Make sure that a data set has what the loss is taken on.

    Args:
        generator: The generator.
        args: The training arguments.
        dataset: The data set; anything but a [`PromptCheckpointDataset`] is let pass.
        what: `"train_dataset"` or `"eval_dataset"`.

    Raises:
        LayoutError: If its adapters do not have the generator's layout.
        PairsFolderError: If it lacks checkpoints or examples that the loss needs.
        GeneratorConfigError: If it has no checkpoints and the generator does not normalise.
    """
    if not isinstance(dataset, PromptCheckpointDataset):
        return
    if dataset.has_checkpoints:
        difference = generator.config.adapter_layout.difference(dataset.layout)
        if difference is not None:
            raise LayoutError(
                f"{what} holds adapters of another layout than the generator (first) writes: {difference}. Build the "
                "generator's configuration from these pairs, or use pairs of the same LoRA configuration and base."
            )
    elif not (args.task_loss_weight or args.distillation_weight) or args.rebuild_steps or args.rebuild_weight:
        raise PairsFolderError(
            f"{what} has no checkpoints, so there is no weight loss. Set task_loss_weight or "
            "distillation_weight above 0, with rebuild_steps=0 and rebuild_weight=0, or collect checkpoints."
        )
    elif generator.config.normalization == "none":
        raise GeneratorConfigError(
            "Without checkpoints a generator must start from the base's own adapter, which is done by normalisation. "
            "Build its configuration with normalization='per_tensor'."
        )
    lacking = [task for task in dataset.tasks if dataset.examples(task) is None] if args.task_loss_weight else []
    if lacking:
        raise PairsFolderError(
            f"Task {lacking[0]!r} of {what} has no examples ({len(lacking)} of {len(dataset.tasks)} tasks), which "
            "task loss needs. Write them with peft_dnd.write_examples(task_folder, examples), or leave the task out."
        )
    silent = [task for task in dataset.tasks if dataset.distillation(task) is None] if args.distillation_weight else []
    if silent:
        raise PairsFolderError(
            f"No teacher has answered task {silent[0]!r} of {what} ({len(silent)} of {len(dataset.tasks)} tasks), as "
            "distillation needs. Have them answered with peft_dnd.fitting.distil_task, or leave the task out."
        )


def _task_loss(
    generator: PromptConditionedLoraGenerator,
    args: DnDTrainingArguments,
    base_model: nn.Module | None,
    function: LossFunction | None,
) -> TaskLoss | None:
    name = "task_loss_weight" if args.task_loss_weight > 0 else "distillation_weight"
    if getattr(args, name) == 0:
        return None
    if base_model is None:
        raise GeneratorConfigError(
            f"{name} is {getattr(args, name):g}, so DnDTrainer needs base_model=..., the frozen base "
            f"whose loss is taken; or set {name}=0."
        )
    layout = generator.config.adapter_layout
    if args.distillation_weight > 0 and isinstance(layout, MethodLayout) and layout.is_soft_prompt:
        raise LayoutError(
            f"Distillation is taken at the places of a prompt's tokens, and a {layout.method} adapter stands before "
            "them. Set distillation_weight=0 and use task loss, or fit adapters of another method."
        )
    return TaskLoss(
        base_model,
        layout,
        function,
        gradient_checkpointing=args.base_gradient_checkpointing,
        device=args.device,
        seed=args.seed,
        tokens_per_pass=args.task_tokens_per_pass,
    )
