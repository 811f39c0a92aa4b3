# SPDX-License-Identifier: Apache-2.0
"""Task loss: the base model's own loss on a task's examples with a generated adapter in place, and its gradient.

A generator is judged by what the base does with its adapters, and a mean squared error in weights says little of that
(Text-to-LoRA, arXiv 2506.06105, found 66.3 against 61.8 on the mean of its benchmarks). So the frozen base's loss is
back-propagated into the adapter's matrices, and through them into the generator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..adapters.layout import AdapterLayout
from ..adapters.method_layout import MethodLayout
from ..errors import GeneratorConfigError
from .adapted_base import AdaptedBase, of_item
from .chosen_places import output_of
from .row_groups import UngroupableError
from .rows import LABEL_PADDING, Places, smallest, stack


logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""`(base model with the adapter in place, batch) -> scalar loss`."""

_ADVICE = "Check the task_loss_function, and that it computes with the model that it is given."


class TaskLoss:
    """The base model's loss on batches of tasks' examples, as a differentiable function of an adapter's tensors.

    The given model is not touched; see [`AdaptedBase`]. Of one adapter the loss is what PEFT's own forward pass gives,
    for every kind of module that LoRA adapts, and for every method of PEFT's of which there is a layout. Of many LoRA
    adapters it is taken in passes that they share, with the same result, where the base's own loss is the mean
    cross-entropy of its logits at the labels, as it is of language models; the first batch tells. Otherwise, and with
    a loss function, it is taken item by item.

    The gradient with respect to the matrices is taken within the call, while they are in place, and kept in the graph:
    the activations of only one pass are held at a time, however many items are in a step. Gradients of the gradient
    are not to be had.

    Args:
        base_model: The base: a plain model, or a `PeftModel` whose active adapter has the layout.
        layout: The layout of the adapters.
        loss_function: `(model, batch) -> scalar`, for bases whose forward gives no loss; by default
            `model(**batch).loss`.
        gradient_checkpointing: Whether each layer of the base is computed again in the backward pass rather than
            kept: less memory, for about a third more time.
        device: Where to; by default the model stays where it is.
        seed: Of the random initialisation of A, where a plain model is given.
        tokens_per_pass: How many tokens, padding included, items that share a pass have at most.

    Attributes:
        base: The copy of the base with adapters in place.

    Raises:
        BaseModelMismatchError: If the layout does not fit the base model.
        LayoutError: If the `PeftModel`'s active adapter has another layout, or is merged.
        GeneratorConfigError: If gradient checkpointing is asked of a model without transformers' layers for it, or
            with an adapter that those layers read as keys and values.
    """

    def __init__(
        self,
        base_model: nn.Module,
        layout: AdapterLayout,
        loss_function: LossFunction | None = None,
        *,
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        tokens_per_pass: int = 8192,
    ) -> None:
        self.base = AdaptedBase(
            base_model,
            layout,
            gradient_checkpointing=gradient_checkpointing,
            device=device,
            seed=seed,
            tokens_per_pass=tokens_per_pass,
        )
        self._loss_function = loss_function or default_loss
        # A soft prompt's labels and logits have other places than those of the batch.
        self._shares = loss_function is None and not (isinstance(layout, MethodLayout) and layout.is_soft_prompt)
        self._shift: int | None = None

    @property
    def model(self) -> nn.Module:
        """The copy of the base."""
        return self.base.model

    @property
    def shares_passes(self) -> bool:
        """Whether items share passes of the base, as far as is known: the first batch tells."""
        return self._shares and self.base.shares_passes

    def __call__(self, matrices: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
        """The loss with the adapter of these matrices.

        Args:
            matrices: PEFT on-disk key -> matrix, all of the layout's, of any floating dtype.
            batch: What the loss function takes; by default keyword arguments of the base's forward.

        Returns:
            A float32 scalar on the matrices' device, with a graph to the matrices where gradients are enabled.

        Raises:
            LayoutError: If a matrix is missing.
            GeneratorConfigError: If what comes out is no scalar with a gradient.
        """
        values = self.base.values(matrices)
        batch = _to_device(batch, self.base.device)
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return _LossWithGradients.apply(self, batch, *values)
        with self.base.in_place(values):
            return self.loss(batch).to(values[0].device)

    def losses(self, matrices: Mapping[str, torch.Tensor], batches: Sequence[Any]) -> torch.Tensor:
        """The loss of each item's batch with its own adapter: what a call for each of them gives, in fewer passes.

        Args:
            matrices: PEFT on-disk key -> (B, ...), the matrix's own shape last, any floating dtype; or (1, ...) where
                all items have the same, whose losses must then weigh alike in what is derived.
            batches: B batches.

        Returns:
            (B,), float32, on the matrices' device, with a graph to the matrices where gradients are enabled.

        Raises:
            LayoutError: If a matrix is missing.
            GeneratorConfigError: If what comes out is no scalar with a gradient, or an item has no label.
        """
        if self._shares and self._shift is None:
            self._find_shift(matrices, batches[0])
        if self._shares:
            try:
                return self._shared_losses(matrices, batches)
            except UngroupableError as error:
                logger.info("The loss of each item of a batch is taken apart: %s.", error)
        return torch.stack(
            [
                self({key: of_item(matrix, item) for key, matrix in matrices.items()}, batch)
                for item, batch in enumerate(batches)
            ]
        )

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        """The matrices that the base brought along, float32 on the CPU: for a plain model B = 0 and a random A."""
        return self.base.initial_adapter()

    def loss(self, batch: Any) -> torch.Tensor:
        """The copy's loss, float32, with whatever matrices are in place."""
        with torch.autocast(self.base.device.type, enabled=False):
            loss = self._loss_function(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise GeneratorConfigError(f"The task loss must be a scalar tensor and is {what}. {_ADVICE}")
        return loss.float()

    def _shared_losses(
        self, matrices: Mapping[str, torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> torch.Tensor:
        shift = self._shift or 0
        if not all(_has_labels(batch) for batch in batches):
            raise UngroupableError("an item's batch has no labels for each row and column")
        targets = [_targets(batch["labels"], shift) for batch in batches]
        stacked = stack(targets, LABEL_PADDING).to(self.base.device)

        def cross_entropy(logits: torch.Tensor, places: Places) -> torch.Tensor:
            return nn.functional.cross_entropy(logits, places.of(stacked).to(logits.device), reduction="none")

        return self.base.losses(matrices, batches, [target != LABEL_PADDING for target in targets], cross_entropy)

    @torch.no_grad()
    def _find_shift(self, matrices: Mapping[str, torch.Tensor], batch: Any) -> None:
        """Find out whether the base's own loss is the mean cross-entropy of its logits at the labels, and which.

        Those of language models are at the place before the label, those of masked ones at the label's own.
        """
        reason = "the base's forward is not given labels for each row and column"
        if _has_labels(batch):
            try:
                if (shift := self._shift_on(matrices, batch)) is not None:
                    self._shift = shift
                    return
            except Exception as error:  # whatever a model says of a few rows, where not all that it reads is rows
                logger.info("A few rows alone cannot be read: %s: %s.", type(error).__name__, error)
            reason = "the base's own loss is not the mean cross-entropy of its logits at the labels"
        self._shares = False
        logger.info("The loss of each item of a batch is taken apart: %s.", reason)

    def _shift_on(self, matrices: Mapping[str, torch.Tensor], batch: Any) -> int | None:
        few, _ = smallest(batch, batch["labels"][:, 1:] != LABEL_PADDING)
        few = _to_device(few, self.base.device)
        with self.base.in_place([value[0] for value in self.base.values(matrices)]):
            output = self.model(**few)
        own, logits = (output_of(output, name) for name in ("loss", "logits"))
        found = (s for s in (1, 0) if _is_cross_entropy(own, logits, _targets(few["labels"], s)))
        return next(found, None)


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradient is taken at once, so that only one task's activations are alive at a time."""

    @staticmethod
    def forward(ctx: Any, task_loss: TaskLoss, batch: Any, *matrices: torch.Tensor) -> torch.Tensor:
        leaves = [matrix.detach().requires_grad_() for matrix in matrices]
        with torch.enable_grad(), task_loss.base.in_place(leaves):
            loss = task_loss.loss(batch)
            if not loss.requires_grad:
                raise GeneratorConfigError(f"The task loss does not depend on the adapter. {_ADVICE}")
            # While they are in place: a checkpointed layer is computed again in here.
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves, allow_unused=True))
        return loss.detach().to(matrices[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(saved if saved is None else saved * gradient for saved in ctx.saved_tensors)


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss that a model's own forward pass gives: `model(**batch).loss`.

    Raises:
        GeneratorConfigError: If it gives none.
    """
    loss = output_of(model(**batch), "loss")
    if loss is None:
        raise GeneratorConfigError(
            f"{type(model).__name__} gives no loss for a batch of {sorted(batch)}. Write examples with the labels "
            "that its forward takes, or pass DnDTrainer a task_loss_function(model, batch)."
        )
    return loss


def _has_labels(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def _targets(labels: torch.Tensor, shift: int) -> torch.Tensor:
    """What the logits at each place are held against: the label so many places further on."""
    return nn.functional.pad(labels[:, shift:], (0, shift), value=LABEL_PADDING)


def _is_cross_entropy(own: torch.Tensor | None, logits: torch.Tensor | None, targets: torch.Tensor) -> bool:
    if own is None or own.dim() > 0 or logits is None or logits.dim() != 3 or logits.shape[:2] != targets.shape:
        return False
    # Flat, as models do: the sums of a large vocabulary come out otherwise in another order.
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=LABEL_PADDING)
    return torch.allclose(loss, own.float(), rtol=1e-5, atol=1e-6)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch
