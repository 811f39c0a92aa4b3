# SPDX-License-Identifier: Apache-2.0
"""Putting the matrices of an adapter into a live model: as a new adapter, or in place of an adapter's present ones."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import BaseModelMismatchError, LayoutError, WeightValueError
from .layout import AdapterLayout
from .lora import check_supported, check_tensor, live_matrices, lora_layers, matrix_keys
from .matching import (
    base_model_of,
    check_fits,
    clean_name,
    lora_config_for,
    match_modules,
    uncompiled,
    warn_if_other_base,
)


_GENERATING_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# What accelerate's init_empty_weights replaces while it is in force.
_register_parameter = nn.Module.register_parameter


class MatrixSlot(NamedTuple):
    """Where one matrix goes: the parameter `name` of `holder`, inside `layer`."""

    layer: LoraLayer
    holder: nn.Module
    name: str
    key: str
    side: str
    adapter_name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        return cast(nn.Parameter, self.holder._parameters[self.name])

    @property
    def is_prepared(self) -> bool:
        """Whether PEFT's `prepare_model_for_compiled_hotswap` made the layer ready for other ranks and scalings."""
        return isinstance(self.layer.scaling[self.adapter_name], torch.Tensor)

    @property
    def is_current(self) -> bool:
        """Whether this is where the layer has the matrix now: PEFT exchanges modules where it pads ranks."""
        kind = "embedding_" if self.name == self.adapter_name else ""
        holder = getattr(self.layer, f"lora_{kind}{self.side}")
        if not kind:
            holder = dict(holder.items()).get(self.adapter_name)
        return holder is self.holder

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape goes here: one of the very shape, or of a smaller rank where prepared."""
        here = tuple(self.parameter.shape)
        if here == shape or not self.is_prepared or len(here) != 2 or len(shape) != 2:
            return here == shape
        rank = self._rank_axis
        return shape[1 - rank] == here[1 - rank] and shape[rank] < here[rank]

    def write(self, value: torch.Tensor) -> None:
        """Copy a matrix of a shape that it takes into the parameter; ranks that it lacks become zero."""
        parameter = self.parameter
        if parameter.shape == value.shape:
            parameter.copy_(value)
        else:
            parameter.zero_()
            parameter.narrow(self._rank_axis, 0, value.shape[self._rank_axis]).copy_(value)

    @property
    def _rank_axis(self) -> int:
        return 0 if self.side == "A" else 1


@contextmanager
def real_parameters() -> Iterator[None]:
    """Within this context modules are made with real weights, whatever meta-device context is around it.

    PEFT's `low_cpu_mem_usage=True` runs inside accelerate's `init_empty_weights`: whatever is loaded there loses its
    values without an error.
    """
    outer = nn.Module.register_parameter
    on_meta = torch.get_default_device().type == "meta"
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    try:
        with torch.device("cpu") if on_meta else nullcontext():
            yield
    finally:
        nn.Module.register_parameter = outer  # type: ignore[method-assign]


def load_matrices(
    model: nn.Module, adapter_name: str, layout: AdapterLayout, state_dict: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Put an adapter into a model, under a new name or in place of the adapter that has the name.

    Args:
        model: A base model; a `PeftModel` or `PeftMixedModel`; a transformers model with adapters of its own.
        adapter_name: The adapter's name in the model.
        layout: The adapter's layout.
        state_dict: PEFT on-disk key -> tensor, just the layout's; see [`AdapterLayout.check_state_dict`].

    Returns:
        A new `PeftModel` for a base model, otherwise the given model.

    Raises:
        BaseModelMismatchError: If the adapter does not fit the base model, which is left untouched.
        LayoutError: If there is an adapter of that name and it differs in more than its weights.
    """
    if not isinstance(model, nn.Module):
        raise BaseModelMismatchError(
            f"An adapter is put into a loaded model, got {model!r}. Load the base model first, for instance with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise LayoutError(
            f"An adapter's name must be a string, not empty and without a full stop, as a module's name is; got "
            f"{adapter_name!r}."
        )
    model, names = attach_adapter(model, adapter_name, layout)
    fill_adapter(model, adapter_name, layout, state_dict, names)
    return model


def attach_adapter(model: nn.Module, adapter_name: str, layout: AdapterLayout) -> tuple[nn.Module, dict[str, str]]:
    """Make sure that a model has an adapter of a layout: add a fresh one, or check the one that has the name.

    Args:
        model: As for [`load_matrices`].
        adapter_name: The adapter's name in the model.
        layout: The layout.

    Returns:
        A new `PeftModel` for a base model, otherwise the given model; and layout module name -> name in the base.

    Raises:
        BaseModelMismatchError: As for [`load_matrices`].
        LayoutError: As for [`load_matrices`].
    """
    names = match_modules(model, layout)
    check_fits(model, layout, names)
    warn_if_other_base(model, layout)
    if adapter_name in (getattr(uncompiled(model), "peft_config", None) or {}):
        _check_swappable(model, adapter_name, layout, names)
    else:
        # PEFT writes the name of the base model at hand itself, and warns where it finds another one there.
        settings = {"base_model_name_or_path": None, "task_type": _task_type_for(model, layout)}
        model = add_empty_adapter(model, adapter_name, lora_config_for(model, layout, names, settings=settings))
    return model, names


def _task_type_for(model: nn.Module, layout: AdapterLayout) -> str | None:
    """The layout's task type, unless PEFT's class for it needs to generate text and the model's head cannot."""
    generates = hasattr(base_model_of(model), "prepare_inputs_for_generation")
    return layout.task_type if generates or layout.task_type not in _GENERATING_TASK_TYPES else None


def add_empty_adapter(model: nn.Module, adapter_name: str, config: PeftConfig) -> nn.Module:
    """Have PEFT or transformers, whichever manages the model's adapters, make a new one and activate it."""
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    elif getattr(model, "_hf_peft_config_loaded", False):
        cast(PreTrainedModel, model).add_adapter(config, adapter_name)
    elif getattr(model, "peft_config", None):
        inject_adapter_in_model(config, model, adapter_name)
    else:
        with warnings.catch_warnings():
            # PEFT reads a property of transformers' that has another name by now, for every model it wraps. Whoever
            # calls get_peft_model sees that; here nobody did.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(model, config, adapter_name)
    return model


def fill_adapter(
    model: nn.Module,
    adapter_name: str,
    layout: AdapterLayout,
    state_dict: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
) -> None:
    """Copy an adapter's matrices over those that a model has under the adapter's name.

    Parameters stay the same objects, so that optimisers and compiled code keep them; device and dtype stay theirs.
    Parameters on the meta device become real ones on the base layer's device. Nothing is copied unless all fits. Where
    PEFT's `prepare_model_for_compiled_hotswap` was called, the layout's ranks may be smaller than the parameters', and
    the scalings become the layout's.

    Args:
        model: A model with the adapter's layers in it.
        adapter_name: The adapter's name in the model.
        layout: The layout of the adapter.
        state_dict: PEFT on-disk key -> tensor, just the layout's.
        names: Layout module name -> name in the base model.

    Raises:
        LayoutError: If the model's adapter has other modules or other shapes than the layout.
        WeightValueError: If a tensor is on the meta device or not finite.
    """
    slots = matrix_slots(model, adapter_name, layout, names)
    for slot, tensor in zip(slots, layout.tensors, strict=True):
        here = tuple(slot.parameter.shape)
        expected = tensor.shape if slot.takes(tensor.shape) else here
        check_tensor(state_dict[slot.key], slot.key, expected, "the adapter")
    on_meta = set()
    with torch.no_grad(), real_parameters():
        for slot in slots:
            parameter, value = slot.parameter, state_dict[slot.key]
            if parameter.is_meta:
                made = nn.Parameter(value.to(parameter.dtype, copy=True), parameter.requires_grad)
                slot.holder._parameters[slot.name] = made
                on_meta.add(slot.layer)
            else:
                slot.write(value)
        for layer in on_meta:
            layer._move_adapter_to_device_of_base_layer(adapter_name)
        rescale(slots, layout)
    lost = [slot.key for slot in slots if slot.parameter.is_meta]
    if lost:
        raise WeightValueError(f"{lost[0]!r} ended up on the meta device. Load the base model's weights first.")


def rescale(slots: Sequence[MatrixSlot], layout: AdapterLayout) -> None:
    """Give the layers that PEFT has prepared for other scalings those of a layout.

    Args:
        slots: What [`matrix_slots`] gave for the layout.
        layout: The layout.
    """
    for slot, module in zip(slots[::2], layout.modules, strict=True):
        if slot.is_prepared:
            cast(torch.Tensor, slot.layer.scaling[slot.adapter_name]).fill_(layout.scaling(module))


def _check_swappable(model: nn.Module, adapter_name: str, layout: AdapterLayout, names: Mapping[str, str]) -> None:
    """Make sure that an adapter in a model differs from one of the layout in the values of its matrices alone.

    Where PEFT has prepared the model for it, ranks may be smaller and scalings others.
    """
    config = uncompiled(model).peft_config[adapter_name]  # type: ignore[index]
    what = f"adapter {adapter_name!r} of the model"
    if not isinstance(config, LoraConfig):
        raise LayoutError(f"{what} is a {type(config).__name__}, no LoRA adapter. Use another adapter_name.")
    matrices_only = copy.copy(config)
    matrices_only.modules_to_save = None  # a classifier head beside the matrices stays as it is
    check_supported(matrices_only, what)
    slots = matrix_slots(model, adapter_name, layout, names)
    for slot, tensor in zip(slots, layout.tensors, strict=True):
        if adapter_name in slot.layer.merged_adapters:
            raise LayoutError(f"{what} is merged into the base weights. Call unmerge_adapter() first.")
        if not slot.takes(tensor.shape):
            raise LayoutError(
                f"{what} has shape {tuple(slot.parameter.shape)} where the new one has {tensor.shape}, for "
                f"{slot.key!r}. Use another adapter_name, or delete_adapter first."
            )
    for slot, module in zip(slots[::2], layout.modules, strict=True):
        if slot.is_prepared:
            continue
        scaling = float(slot.layer.scaling[adapter_name])
        if not math.isclose(scaling, layout.scaling(module), rel_tol=1e-6):
            raise LayoutError(
                f"{what} scales {names[module.name]!r} by {scaling:g}; the new one is to be scaled by "
                f"{layout.scaling(module):g} (alpha {module.alpha:g}, rank {module.rank}). Use another adapter_name, "
                "or give both the same lora_alpha."
            )


def matrix_slots(
    model: nn.Module, adapter_name: str, layout: AdapterLayout, names: Mapping[str, str]
) -> list[MatrixSlot]:
    """Where a model keeps each matrix of an adapter, in the layout's order: module by module, A before B.

    Args:
        model: A model with the adapter in it.
        adapter_name: The adapter's name.
        layout: The adapter's layout.
        names: Layout module name -> name in the base model.

    Raises:
        LayoutError: If the model's adapter has other modules than the layout.
    """
    live = {clean_name(name): layer for name, layer in lora_layers(base_model_of(model), adapter_name)}
    slots = []
    for module in layout.modules:
        layer = live.pop(names[module.name], None)
        if layer is None:
            raise LayoutError(f"Adapter {adapter_name!r} of the model has no matrices at {names[module.name]!r}.")
        kind = live_matrices(layer, adapter_name)[0]
        if kind != module.kind:
            raise LayoutError(f"{names[module.name]!r} is adapted as {kind} in the model; expected {module.kind}.")
        for side, key in zip("AB", matrix_keys(module.name, module.kind), strict=True):
            if kind == "embedding":
                holder, name = getattr(layer, f"lora_embedding_{side}"), adapter_name
            else:
                holder, name = getattr(layer, f"lora_{side}")[adapter_name], "weight"
            slots.append(MatrixSlot(layer, holder, name, key, side, adapter_name))
    if live:
        raise LayoutError(
            f"Adapter {adapter_name!r} of the model also adapts {min(live)!r}, which is not in the layout."
        )
    return slots
