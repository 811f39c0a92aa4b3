# SPDX-License-Identifier: Apache-2.0
"""A copy of a base model's structure that shares its weights, with an adapter's layers in it, frozen."""

from __future__ import annotations

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
from ..errors import GeneratorConfigError, LayoutError


def frozen_copy(base_model: nn.Module, layout: AdapterLayout, seed: int) -> tuple[nn.Module, list[MatrixSlot]]:
    """A copy that shares the base's weights, in evaluation mode, and where it keeps the adapter's matrices.

    Args:
        base_model: A plain model, or a `PeftModel` whose active adapter has the layout; it is not touched.
        layout: The layout.
        seed: Of the random initialisation of A, where a plain model is given.

    Raises:
        BaseModelMismatchError: If the layout does not fit the base model.
        LayoutError: If the `PeftModel`'s active adapter has another layout, or is merged.
    """
    name = _active_adapter(base_model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        adapted, names = attach_adapter(sharing_copy(uncompiled(base_model)), name, layout)
    model = base_model_of(adapted).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)
            module.enable_adapters(True)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values are not read again, and recomputing would add to them
    return model, matrix_slots(model, name, layout, names)


def checkpoint_layers(model: nn.Module) -> None:
    """Have each layer computed again in the backward pass, in evaluation mode too, unlike transformers' own way."""
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
