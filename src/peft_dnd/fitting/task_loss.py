# SPDX-License-Identifier: Apache-2.0
"""Task loss: the base model's own loss on a task's examples with a generated adapter in place, and its gradient.

A generator is judged by what the base does with its adapters, and a mean squared error in weights says little of that
(Text-to-LoRA, arXiv 2506.06105, found 66.3 against 61.8 on the mean of its benchmarks). So the frozen base's loss is
back-propagated into the adapter's matrices, and through them into the generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.layout import AdapterLayout
from ..adapters.loading import attach_adapter, matrix_slots
from ..adapters.matching import base_model_of, uncompiled
from ..adapters.tokenizer import WeightTokenizer
from ..errors import GeneratorConfigError, LayoutError


LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""`(base model with the adapter in place, batch) -> scalar loss`."""

_ADVICE = "Check the task_loss_function, and that it computes with the model that it is given."


class TaskLoss:
    """The base model's loss on a batch of a task's examples, as a differentiable function of LoRA matrices.

    The given model is not touched, not even for a moment: the loss is taken on a copy of its structure that shares its
    weights, in evaluation mode, frozen, in its own dtype whatever mixed precision is in force. The matrices are put in
    place of the copy's LoRA parameters for the time of one call; nothing is merged or copied, so that the call is what
    PEFT's own forward pass gives, for every kind of module that LoRA adapts.

    The gradient with respect to the matrices is taken within the call, while they are in place, and kept in the graph:
    the activations of only one task's batch are held at a time, however many are in a step, and what the backward pass
    of a checkpointed layer computes again is computed with the same matrices. Gradients of the gradient are not to be
    had.

    Args:
        base_model: The base: a plain model, or a `PeftModel` whose active adapter has the layout.
        layout: The layout of the adapters.
        loss_function: `(model, batch) -> scalar`, for bases whose forward gives no loss; by default
            `model(**batch).loss`.
        gradient_checkpointing: Whether each layer of the base is computed again in the backward pass rather than
            kept: less memory, for about a third more time.
        device: Where to; by default the model stays where it is.
        seed: Of the random initialisation of A, where a plain model is given.

    Attributes:
        model: The copy.

    Raises:
        BaseModelMismatchError: If the layout does not fit the base model.
        LayoutError: If the `PeftModel`'s active adapter has another layout, or is merged.
        GeneratorConfigError: If gradient checkpointing is asked of a model without transformers' layers for it.
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
    ) -> None:
        self.layout = layout
        self._loss_function = loss_function or default_loss
        name = _active_adapter(base_model)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model, names = attach_adapter(_sharing_copy(base_model), name, layout)
        self.model = base_model_of(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(name)
                module.enable_adapters(True)
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # keys and values are not read again, and recomputing would add to them
        if gradient_checkpointing:
            _checkpoint_layers(self.model)
        if device is not None and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        self._slots = matrix_slots(self.model, name, layout, names)
        self._own = [slot.parameter for slot in self._slots]

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
        missing = [slot.key for slot in self._slots if slot.key not in matrices]
        if missing:
            raise LayoutError(f"The adapter lacks {missing[0]!r}, which the base's adapter has.")
        values = [matrices[slot.key] for slot in self._slots]
        batch = _to_device(batch, self._own[0].device)
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return _LossWithGradients.apply(self, batch, *values)
        with self.in_place(values):
            return self.loss(batch).to(values[0].device)

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        """The matrices that the base brought along, float32 on the CPU: for a plain model B = 0 and a random A."""
        return {slot.key: own.detach().cpu().float() for slot, own in zip(self._slots, self._own, strict=True)}

    def loss(self, batch: Any) -> torch.Tensor:
        """The copy's loss, float32, with whatever matrices are in place."""
        with torch.autocast(self._own[0].device.type, enabled=False):
            loss = self._loss_function(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise GeneratorConfigError(f"The task loss must be a scalar tensor and is {what}. {_ADVICE}")
        return loss.float()

    @contextmanager
    def in_place(self, matrices: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context the copy's LoRA parameters are these matrices, in the layout's order.

        It does what `torch.func.functional_call` does, but for any function of the model and for its backward pass.
        """
        try:
            for slot, own, matrix in zip(self._slots, self._own, matrices, strict=True):
                slot.holder._parameters[slot.name] = matrix.to(own.device, own.dtype)  # type: ignore[assignment]
            yield
        finally:
            for slot, own in zip(self._slots, self._own, strict=True):
                slot.holder._parameters[slot.name] = own


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradient is taken at once, so that only one task's activations are alive at a time."""

    @staticmethod
    def forward(ctx: Any, task_loss: TaskLoss, batch: Any, *matrices: torch.Tensor) -> torch.Tensor:
        leaves = [matrix.detach().requires_grad_() for matrix in matrices]
        with torch.enable_grad(), task_loss.in_place(leaves):
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
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise GeneratorConfigError(
            f"{type(model).__name__} gives no loss for a batch of {sorted(batch)}. Write examples with the labels "
            "that its forward takes, or pass DnDTrainer a task_loss_function(model, batch)."
        )
    return loss


def untrained_statistics(
    tokenizer: WeightTokenizer, initial: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scale for [`WeightNormalization.set_statistics`] where there are no adapters to take them from.

    The mean is the adapter that the base brings along, so that an unfitted generator writes just that one; it must not
    be zero in both A and B, where the loss has no gradient. The scale of a matrix is 1 / sqrt(3 n), n the length of
    its long side: for A the standard deviation of PEFT's own initialisation, and for B the like.

    Args:
        tokenizer: The tokenizer.
        initial: PEFT on-disk key -> matrix.

    Returns:
        Float32 mean of shape `grid_shape`, and float32 scale of shape (N_w,).
    """
    scale = torch.tensor([(3.0 * tensor.long_size) ** -0.5 for tensor in tokenizer.layout.tensors])
    return tokenizer.encode(initial), scale[tokenizer.tensor_index()]


def _active_adapter(model: nn.Module) -> str:
    inner = uncompiled(model)
    if not isinstance(inner, PeftModel):
        return "default"
    active = inner.active_adapters
    if len(active) != 1:
        raise LayoutError(
            f"The base has {len(active)} active adapters ({active}); a generator writes one. Activate one."
        )
    return active[0]


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's structure whose weights are the model's own, but for being frozen: no weight is copied."""
    model = uncompiled(model)
    # deepcopy takes what its memo already has for an object.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised kinds carry more than their data, and are frozen anyway
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo)


def _checkpoint_layers(model: nn.Module) -> None:
    """Have each layer computed again in the backward pass, in evaluation mode too, unlike transformers' own way."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise GeneratorConfigError(
            f"base_gradient_checkpointing needs a transformers model whose layers support it; {type(model).__name__} "
            "has none. Turn it off, and draw fewer examples: those of only one item are held at a time."
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch
