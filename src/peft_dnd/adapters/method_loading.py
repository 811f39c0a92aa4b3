# SPDX-License-Identifier: Apache-2.0
"""Putting an adapter of another method than plain LoRA into a live model, by PEFT's own means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ..errors import BaseModelMismatchError, LayoutError
from .loading import add_empty_adapter, real_parameters
from .lora import check_tensor
from .matching import base_model_of, uncompiled, warn_if_other_base
from .method_layout import MethodLayout, method_layout, method_layout_from_config, trained_tensors


def load_method_adapter(
    model: nn.Module, adapter_name: str, layout: MethodLayout, state_dict: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Put an adapter into a model, under a new name or in place of the adapter that has the name.

    Args:
        model: A base model; a `PeftModel`; a transformers model with adapters of its own.
        adapter_name: The adapter's name in the model.
        layout: The adapter's layout.
        state_dict: PEFT on-disk key -> tensor, just the layout's.

    Returns:
        A new `PeftModel` for a base model, otherwise the given model.

    Raises:
        BaseModelMismatchError: If the adapter does not fit the base model, which is left untouched.
        LayoutError: If there is an adapter of that name and it differs in more than its weights.
    """
    model = attach_method_adapter(model, adapter_name, layout)
    fill_method_adapter(trained_tensors(uncompiled(model), adapter_name), state_dict)
    return model


def attach_method_adapter(model: nn.Module, adapter_name: str, layout: MethodLayout) -> nn.Module:
    """Make sure that a model has an adapter of a layout: add a fresh one, or check the one that has the name.

    Args:
        model: As for [`load_method_adapter`].
        adapter_name: The adapter's name in the model.
        layout: The layout.

    Returns:
        A new `PeftModel` for a base model, otherwise the given model.

    Raises:
        BaseModelMismatchError: As for [`load_method_adapter`].
        LayoutError: As for [`load_method_adapter`].
    """
    configs = getattr(uncompiled(model), "peft_config", None) or {}
    if adapter_name in configs:
        live = _layout_of(uncompiled(model), adapter_name)
        difference = layout.difference(live)
        if difference is not None:
            raise LayoutError(
                f"The model's adapter {adapter_name!r} differs from the new one in more than its weights: "
                f"{difference} (the first is the new one). Use another adapter_name, or delete_adapter first."
            )
    else:
        check_method_fits(model, layout)
        model = _add(model, adapter_name, layout.peft_config())
    return model


def check_method_fits(model: nn.Module, layout: MethodLayout) -> None:
    """Make sure that PEFT would give a model an adapter of just this layout; the model is untouched.

    Raises:
        BaseModelMismatchError: Otherwise.
    """
    base = base_model_of(model)
    called = f"this {type(base).__name__}"
    meta = next((name for name, parameter in base.named_parameters() if parameter.is_meta), None)
    try:
        if meta is not None:
            raise LayoutError(f"its {meta!r} is on the meta device, where no weights can be put")
        if getattr(model, "peft_config", None):
            difference = _difference_in_adapted(model, layout)
        else:
            difference = layout.difference(method_layout_from_config(layout.peft_config(), base))
        if difference is not None:
            raise LayoutError(f"{difference} (the first is the adapter, the second what fits the base)")
    except (LayoutError, ValueError) as error:
        raise BaseModelMismatchError(
            f"The {layout.method} adapter does not fit {called}: {error}. The model is untouched. Use the base model "
            "that the generator was fitted for, or a generator fitted for this one."
        ) from error
    warn_if_other_base(model, layout)


def fill_method_adapter(parameters: Mapping[str, nn.Parameter], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Copy an adapter's tensors over those that a model has; nothing is copied unless all fit.

    Raises:
        LayoutError: If one is missing, or has another shape.
        WeightValueError: If one is on the meta device or not finite.
    """
    missing = sorted(parameters.keys() ^ state_dict.keys())
    if missing:
        raise LayoutError(f"{missing[0]!r} is in the model's adapter or in the new one, but not in both.")
    for key, parameter in parameters.items():
        check_tensor(state_dict[key], key, tuple(parameter.shape), "the adapter")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state_dict[key])


def _layout_of(model: Any, adapter_name: str) -> MethodLayout:
    shapes = {key: tuple(value.shape) for key, value in trained_tensors(model, adapter_name).items()}
    return method_layout(model.peft_config[adapter_name], shapes)


def _difference_in_adapted(model: Any, layout: MethodLayout) -> str | None:
    """As PEFT would find it in a model that has adapters already: of a skeleton, one fits as the other does."""
    inner: Any = uncompiled(model)
    for name, config in inner.peft_config.items():
        if type(config) is type(layout.peft_config()):
            return layout.difference(_layout_of(inner, name))
    return f"the model has adapters of other methods ({', '.join(inner.peft_config)})"


def _add(model: nn.Module, adapter_name: str, config: PeftConfig) -> nn.Module:
    training = model.training
    with warnings.catch_warnings(), real_parameters():
        warnings.simplefilter("ignore")
        added = add_empty_adapter(model, adapter_name, config)
    return added if added is model else added.train(training)  # PEFT's wrapper begins in training mode
