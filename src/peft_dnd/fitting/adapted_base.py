# SPDX-License-Identifier: Apache-2.0
"""The frozen base with generated adapters in place: one at a time, or many in one pass, each on its own rows.

What is taken of it, loss or logits, is a differentiable function of the adapters' tensors: LoRA's matrices, or what
another of PEFT's methods trains.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from ..adapters.layout import AdapterLayout
from ..errors import GeneratorConfigError, LayoutError
from ..pairs.collator import ExampleCollator
from .agreement import disagreement, varied
from .chosen_places import HeadError, head_of, logits_at_places
from .frozen_copy import checkpoint_layers, frozen_copy
from .row_groups import GroupedLayers, UngroupableError
from .rows import Pass, Places, Rows, smallest


logger = logging.getLogger(__name__)

_T = TypeVar("_T")

PositionLoss = Callable[[torch.Tensor, Places], torch.Tensor]
"""`(logits (N, V) in float32, the N places they are of) -> the loss of each, (N,)`."""

# What a pass costs beside its tokens, in tokens: measured on two cores; a GPU is idle for most of a short pass.
_PASS_COST_ON_CPU = 64
_PASS_COST = 1024

_MOST_LOGITS = 2**26
"""How many logits a pass computes at most, but those of one row at least: 256 MiB, and thrice that with gradients."""


class AdaptedBase:
    """A frozen base model in which adapters' tensors are put in place, of one adapter or of many.

    The given model is not touched, not even for a moment: this is a copy of its structure that shares its weights, in
    evaluation mode, frozen, in its own dtype whatever mixed precision is in force. Nothing is merged or copied.

    Many adapters: the rows of all items go through the base together, each item's with its own A and B beside every
    adapted layer, and the head computes the logits that are asked for and no others. Where a model does not allow the
    one or the other, which its layers tell and a comparison on the first rows that come, items are taken one by one,
    or all logits are computed; it is logged, and the results are the same. Adapters of other methods than plain LoRA
    are always taken one by one.

    Args:
        base_model: The base: a plain model, or a `PeftModel` whose active adapter has the layout.
        layout: The layout of the adapters.
        gradient_checkpointing: Whether each layer of the base is computed again in the backward pass rather than
            kept: less memory, for about a third more time.
        device: Where to; by default the model stays where it is.
        seed: Of the random initialisation of A, where a plain model is given.
        tokens_per_pass: How many tokens, padding included, the base reads at once at most, but one row at least.

    Attributes:
        model: The copy.

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
        *,
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        tokens_per_pass: int = 8192,
    ) -> None:
        self.layout = layout
        self.tokens_per_pass = tokens_per_pass
        copied = frozen_copy(base_model, layout, seed)
        self.model, self._tensors = copied.model, copied.tensors
        if gradient_checkpointing:
            checkpoint_layers(self.model, layout)
        if device is not None and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        self._own = [tensor.value for tensor in self._tensors]
        self._layers = GroupedLayers(copied.slots)
        self._head = head_of(self.model)
        self._vocabulary = _vocabulary(self.model)
        self._reading: dict[str, Any] = {
            "pad_token_id": ExampleCollator.for_model(self.model).pad_token_id,
            "masks": _takes_masks(self.model),
        }
        self._groups = self._layers.refusal is None
        if self._layers.refusal is not None:
            logger.info("The items of a batch are taken one by one: %s.", self._layers.refusal)
        self._compared = False

    @property
    def device(self) -> torch.device:
        """Where the base's inputs go."""
        return self._own[0].device

    @property
    def shares_passes(self) -> bool:
        """Whether items share passes of the base, as far as is known: the first rows tell."""
        return self._groups

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        """The tensors that the base brought along, float32 on the CPU: for a plain model PEFT's own start."""
        return {each.key: own.detach().cpu().float() for each, own in zip(self._tensors, self._own, strict=True)}

    def values(self, matrices: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """An adapter's matrices, or those of many with a batch axis, in the layout's order.

        Raises:
            LayoutError: If one is missing.
        """
        missing = [each.key for each in self._tensors if each.key not in matrices]
        if missing:
            raise LayoutError(f"The adapter lacks {missing[0]!r}, which the base's adapter has.")
        return [matrices[each.key] for each in self._tensors]

    @contextmanager
    def in_place(self, matrices: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context the copy's adapter consists of these tensors, in the layout's order.

        It does what `torch.func.functional_call` does, but for any function of the model and for its backward pass.
        """
        try:
            for each, own, matrix in zip(self._tensors, self._own, matrices, strict=True):
                each.put(matrix.to(own.device, own.dtype))
            yield
        finally:
            for each, own in zip(self._tensors, self._own, strict=True):
                each.put(own)

    def losses(
        self,
        matrices: Mapping[str, torch.Tensor],
        batches: Sequence[Mapping[str, torch.Tensor]],
        at: Sequence[torch.Tensor],
        position_loss: PositionLoss,
    ) -> torch.Tensor:
        """Each item's mean loss over chosen places of its rows, with its own adapter in place.

        The gradient with respect to the matrices is taken within the call, pass by pass, and kept in the graph: the
        activations of one pass are held at a time. Gradients of the gradient are not to be had.

        Args:
            matrices: PEFT on-disk key -> (B, ...), the matrix's own shape last, any floating dtype; or (1, ...) where
                all items have the same, which saves time. The items' losses must then weigh alike in what is derived.
            batches: For each item keyword arguments of the base's forward, tensors with rows first.
            at: For each item (rows, columns), bool: the places, at least one for each item. Logits at a place are
                those for the token after it.
            position_loss: The loss of each place; called for each pass.

        Returns:
            (B,), float32, on the matrices' device, with a graph to the matrices where gradients are enabled.

        Raises:
            LayoutError: If a matrix is missing.
            GeneratorConfigError: If an item has no place.
            UngroupableError: If the batches are not of rows, or the model gives no logits of each row and column.
        """
        values = self.values(matrices)
        empty = [number for number, wanted in enumerate(at) if not wanted.any()]
        if empty:
            raise GeneratorConfigError(
                f"Item {empty[0]} of the batch has no place that a loss is taken on: none of its {len(at[empty[0]])} "
                "examples has a label. Give each example at least one label that is not -100."
            )
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return _LossesWithGradients.apply(self, batches, at, position_loss, *values)
        return self._losses(values, batches, at, position_loss, None)

    @torch.no_grad()
    def logits_at(
        self,
        matrices: Mapping[str, torch.Tensor] | None,
        batches: Sequence[Mapping[str, torch.Tensor]],
        at: Sequence[torch.Tensor],
    ) -> Iterator[tuple[Places, torch.Tensor]]:
        """The logits at chosen places, pass by pass, without gradient.

        Args:
            matrices: As for [`losses`][AdaptedBase.losses]; `None`: the base without adapters.
            batches: As there.
            at: As there; an item may have no place.

        Yields:
            Places, on the base's device, and their logits, (N, V), float32.
        """
        values = None if matrices is None else self.values(matrices)

        def take(part: Pass) -> tuple[Places, torch.Tensor]:
            share = None if values is None else self._share(values, part)
            with torch.no_grad(), self._adapted(share, part):
                return part.places, self._logits(part)

        for one_pass in self._passes(batches, at):
            yield from self._taken(one_pass, take)

    def _losses(
        self,
        values: Sequence[torch.Tensor],
        batches: Sequence[Mapping[str, torch.Tensor]],
        at: Sequence[torch.Tensor],
        position_loss: PositionLoss,
        gradients: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """The items' losses. Their gradients, which do not depend on each other, are added to the given tensors."""
        counts = torch.stack([wanted.sum() for wanted in at]).to(self.device)
        total = torch.zeros(len(at), device=self.device, dtype=torch.float32)  # whatever torch's default is

        def take(part: Pass) -> None:
            leaves = [value.detach().requires_grad_(gradients is not None) for value in self._share(values, part)]
            with torch.set_grad_enabled(gradients is not None), self._adapted(leaves, part):
                logits = self._logits(part)
                losses = position_loss(logits, part.places).to(self.device, torch.float32) / counts[part.places.item]
                if gradients is not None:  # in here: a checkpointed layer is computed again
                    found = _gradients(losses.sum(), leaves)
                    for whole, gradient in zip(self._share(gradients, part), found, strict=True):
                        if gradient is not None:
                            whole.add_(gradient)
            total.index_add_(0, part.places.item, losses.detach())

        for one_pass in self._passes(batches, at):
            for _ in self._taken(one_pass, take):
                pass
        return total.to(values[0].device)

    def _share(self, stacked: Sequence[torch.Tensor], part: Pass) -> Sequence[torch.Tensor]:
        """What a pass needs of all items' matrices: everything, or one item's."""
        return stacked if self._groups else [of_item(one, int(part.item[0])) for one in stacked]

    def _adapted(self, share: Sequence[torch.Tensor] | None, part: Pass) -> AbstractContextManager[None]:
        if share is None:
            return self._without_adapters()
        return self._layers.in_force(share, part.item) if self._groups else self.in_place(share)

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _logits(self, part: Pass) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return logits_at_places(self.model, part, self._head)

    def _taken(self, one_pass: Pass, take: Callable[[Pass], _T]) -> Iterator[_T]:
        """What a function gives of a pass, or of each item's share of it where the pass cannot be had as one."""
        waiting = [one_pass] if self._groups else one_pass.of_items()
        while waiting:
            part = waiting.pop(0).to(self.device)
            try:
                yield take(part)
            except HeadError as error:
                self._give_up_head(str(error))
                waiting.insert(0, part)
            except UngroupableError as error:
                if not self._groups:
                    raise
                self._give_up_groups(str(error))
                waiting = [*part.of_items(), *waiting]

    def _passes(self, batches: Sequence[Mapping[str, Any]], at: Sequence[torch.Tensor]) -> Iterator[Pass]:
        """The rows of all items in passes, of each item apart where they do not go together."""
        most = max(1, _MOST_LOGITS // self._vocabulary)
        cost = _PASS_COST_ON_CPU if self.device.type == "cpu" else _PASS_COST
        if not self._compared:
            self._compare(batches, at)
        if self._groups:
            try:
                yield from Rows(batches, at, **self._reading).passes(self.tokens_per_pass, most, cost)
                return
            except UngroupableError as error:
                logger.info("The items of a batch are taken one by one: %s.", error)
        for number, (batch, wanted) in enumerate(zip(batches, at, strict=True)):
            rows = Rows([batch], [wanted], first=number, **self._reading)
            yield from rows.passes(self.tokens_per_pass, most, cost)

    def _compare(self, batches: Sequence[Mapping[str, Any]], at: Sequence[torch.Tensor]) -> None:
        """Hold a pass of many adapters, and the head at chosen places, against PEFT's own way, on a few rows.

        Adapters are drawn for it, since those of an unfitted generator are all alike. What differs is given up.
        """
        few = [smallest(batch, wanted) for batch, wanted in zip(batches, at, strict=True) if wanted.any()][:2]
        if not few:
            return
        self._compared = True
        chance = torch.Generator().manual_seed(0)
        values = [
            torch.randn(2, *tensor.shape, generator=chance, dtype=torch.float32).mul_(tensor.long_size**-0.5)
            for tensor in self.layout.tensors
        ]
        if not self.layout.modules:  # LoRA's matrices may be anything; what others train stays near where it began
            values = [value + own.detach().cpu() for value, own in zip(values, self._own, strict=True)]
        expected = self._plain_logits(values, few)
        groups, head, self._groups, self._head = self._groups, self._head, False, None
        if head is not None:
            self._head = head
            difference = self._difference(expected, values, few)
            if difference is not None:
                self._give_up_head(difference)
        if groups:
            self._groups = True
            difference = self._difference(expected, values, few)
            if difference is not None:
                self._give_up_groups(difference)

    def _difference(self, expected: torch.Tensor, values: Sequence[torch.Tensor], few: list[Any]) -> str | None:
        """What is wrong with the present way, if anything."""
        try:
            found = self._ordered_logits(values, few)
        except Exception as error:  # whatever a model says of shapes that it did not expect
            return f"{type(error).__name__}: {error}"
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        return disagreement(found, expected, dtypes, lambda noise: self._plain_logits(varied(values, noise), few))

    def _plain_logits(self, values: Sequence[torch.Tensor], few: list[Any]) -> torch.Tensor:
        """The same as `_ordered_logits`, but for one item after another, each with all its logits."""
        ways, self._groups, self._head = (self._groups, self._head), False, None
        try:
            return self._ordered_logits(values, few)
        finally:
            self._groups, self._head = ways

    def _ordered_logits(self, values: Sequence[torch.Tensor], few: list[Any]) -> torch.Tensor:
        """The logits of one or two items' rows, each with one of two adapters, in the order of their places."""
        batches, at = zip(*(few if len(few) > 1 else few * 2), strict=True)
        matrices = dict(zip((each.key for each in self._tensors), values, strict=True))
        found = list(self.logits_at(matrices, batches, at))
        order = torch.cat([places.order() for places, _ in found]).argsort()
        return torch.cat([logits for _, logits in found])[order]

    def _give_up_groups(self, reason: str) -> None:
        self._groups = False
        logger.warning(
            "The items of a batch are taken one by one from now on, for this base cannot be told which row "
            "has which adapter: %s. Results are the same, and take longer.",
            reason,
        )

    def _give_up_head(self, reason: str) -> None:
        self._head = None
        logger.warning(
            "The base's head computes all logits from now on, not only those that are needed: %s. Results "
            "are the same, and take longer and more memory.",
            reason,
        )


class _LossesWithGradients(torch.autograd.Function):
    """Losses of items whose gradients are taken at once, so that only one pass's activations are alive at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        base: AdaptedBase,
        batches: Sequence[Mapping[str, torch.Tensor]],
        at: Sequence[torch.Tensor],
        position_loss: PositionLoss,
        *values: torch.Tensor,
    ) -> torch.Tensor:
        gradients = [torch.zeros_like(value) for value in values]
        losses = base._losses(values, batches, at, position_loss, gradients)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, None, *(_weighted(saved, gradient) for saved in ctx.saved_tensors)


def of_item(stacked: torch.Tensor, item: int) -> torch.Tensor:
    """An item's matrix, of (B, ...) or of (1, ...), which all have."""
    return stacked[item if len(stacked) > 1 else 0]


def _weighted(gradient: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The items' gradients by what the items weigh; of what they share there is the sum of their gradients alone."""
    if len(gradient) != len(weights):
        if not torch.equal(weights, weights[:1].expand_as(weights)):
            raise GeneratorConfigError(
                f"Items that share a matrix must weigh alike in the loss, but weigh {weights.tolist()}. "
                "Give each item a matrix of its own."
            )
        weights = weights[:1]
    return gradient * weights.view(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype)


def _gradients(loss: torch.Tensor, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    if not loss.requires_grad:
        raise GeneratorConfigError("The loss does not depend on the adapter. Check that it is taken on the logits.")
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _takes_masks(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _vocabulary(model: nn.Module) -> int:
    """How many logits a place has, as far as the model tells."""
    get = getattr(model, "get_output_embeddings", None)
    weight = getattr(get() if callable(get) else None, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) and weight.dim() else 1
