# SPDX-License-Identifier: Apache-2.0
"""A copy of a base model's structure that shares its weights, with an adapter's layers in it, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.layout import AdapterLayout
from ..adapters.loading import MatrixSlot, attach_adapter, matrix_slots
from ..adapters.lora import sharing_copy
from ..adapters.matching import base_model_of, uncompiled
from ..adapters.method_layout import MethodLayout, trained_tensors
from ..adapters.method_loading import attach_method_adapter
from ..errors import GeneratorConfigError, LayoutError


@dataclass(frozen=True)
class AdapterTensor:
    """One of an adapter's tensors in a model.

    Attributes:
        key: Its key on disk.
        holders: The modules that hold it, each with the name that it has there: several where weights are tied.
    """

    key: str
    holders: tuple[tuple[nn.Module, str], ...]

    @property
    def value(self) -> torch.Tensor:
        """What is there now."""
        holder, name = self.holders[0]
        value = holder._parameters[name]
        assert value is not None
        return value

    def put(self, value: torch.Tensor) -> None:
        """Put another tensor there, a parameter or not."""
        for holder, name in self.holders:
            holder._parameters[name] = value  # type: ignore[assignment]


@dataclass(frozen=True)
class FrozenCopy:
    """A copy of a base that shares its weights, in evaluation mode.

    Attributes:
        model: The copy; where an adapter stands before the input, PEFT's wrapper, which puts it there.
        tensors: The adapter's tensors, in the layout's order.
        slots: Where they are plain LoRA's, the layers that they belong to; otherwise empty.
    """

    model: nn.Module
    tensors: tuple[AdapterTensor, ...]
    slots: tuple[MatrixSlot, ...] = ()


def frozen_copy(base_model: nn.Module, layout: AdapterLayout, seed: int) -> FrozenCopy:
    """Make a copy that shares the base's weights, in evaluation mode, with an adapter of a layout in it.

    Args:
        base_model: A plain model, or a `PeftModel` whose active adapter has the layout; it is not touched.
        layout: The layout, of any method.
        seed: Of the adapter's random initialisation, where a plain model is given.

    Raises:
        BaseModelMismatchError: If the layout does not fit the base model.
        LayoutError: If the `PeftModel`'s active adapter has another layout, or is merged.
    """
    name = _active_adapter(base_model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        copied = sharing_copy(uncompiled(base_model))
        if isinstance(layout, MethodLayout):
            adapted = attach_method_adapter(copied, name, layout)
            found = FrozenCopy(
                adapted if layout.is_soft_prompt else base_model_of(adapted), _held(adapted, name, layout)
            )
        else:
            adapted, names = attach_adapter(copied, name, layout)
            model = base_model_of(adapted)
            slots = tuple(matrix_slots(model, name, layout, names))
            found = FrozenCopy(model, tuple(AdapterTensor(s.key, ((s.holder, s.name),)) for s in slots), slots)
    found.model.requires_grad_(False).eval()
    for module in found.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)
            module.enable_adapters(True)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values are not read again, and recomputing would add to them
    return found


def _held(model: nn.Module, adapter_name: str, layout: MethodLayout) -> tuple[AdapterTensor, ...]:
    """Where a model holds the tensors of an adapter of any method."""
    trained = trained_tensors(model, adapter_name)
    holders: dict[int, list[tuple[nn.Module, str]]] = {id(parameter): [] for parameter in trained.values()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in holders:
                holders[id(parameter)].append((module, name))
    return tuple(AdapterTensor(tensor.key, tuple(holders[id(trained[tensor.key])])) for tensor in layout.tensors)


def checkpoint_layers(model: nn.Module, layout: AdapterLayout) -> None:
    """Have each layer computed again in the backward pass, in evaluation mode too, unlike transformers' own way."""
    if layout.method == "PREFIX_TUNING":
        raise GeneratorConfigError(
            "A PREFIX_TUNING adapter is a layer's keys and values, to which computing the layer again would add. Turn "
            "base_gradient_checkpointing off, and draw fewer examples."
        )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise GeneratorConfigError(
            f"base_gradient_checkpointing needs a transformers model whose layers support it; {type(model).__name__} "
            "has none. Turn it off, and draw fewer examples."
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


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
