# SPDX-License-Identifier: Apache-2.0
"""The layout of an adapter of whatever method: of plain LoRA its pairs of matrices, of others what PEFT saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from ..errors import LayoutError, MissingFileError
from ..storage.files import PathLike, read_json
from .layout import AdapterLayout
from .lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, live_state_dict, read_lora_config
from .method_layout import (
    MethodLayout,
    config_from,
    is_plain_lora,
    method_layout,
    method_layout_from_config,
    method_layout_from_folder,
    method_tensor,
    read_peft_config,
    trained_tensors,
    without_the_given,
)


def layout_from_config(config: PeftConfig, base_model: nn.Module) -> AdapterLayout:
    """Work out the layout that a PEFT configuration gives on a base model, which may be on the meta device.

    Neither is changed and no weight is copied.

    Args:
        config: The configuration, of any method.
        base_model: The base model.

    Raises:
        LayoutError: If the method keeps what it has learned elsewhere than in trained tensors that PEFT saves.
        ValueError: PEFT's own, if no module is found.
    """
    if is_plain_lora(config):
        assert isinstance(config, LoraConfig)
        return AdapterLayout.from_lora_config(config, base_model)
    return method_layout_from_config(config, base_model)


def layout_from_folder(folder: PathLike) -> AdapterLayout:
    """Read the layout of an adapter that PEFT saved, from its headers alone.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        CorruptFileError: If one of them is unreadable.
        LayoutError: If the installed PEFT does not know the method.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file() or _is_plain(read_json(path)):
        return AdapterLayout.from_folder(folder)
    if not (Path(folder) / ADAPTER_WEIGHTS_NAME).is_file():
        raise MissingFileError(f"There is no {ADAPTER_WEIGHTS_NAME} in {str(folder)!r}. Expected an adapter's folder.")
    return method_layout_from_folder(folder, read_peft_config(folder))


def layout_from_model(model: nn.Module, adapter_name: str = "default") -> AdapterLayout:
    """Read the layout of an adapter from a live model.

    Args:
        model: A `PeftModel`, or a model with injected adapters.
        adapter_name: Which of its adapters.

    Raises:
        LayoutError: If the model has no adapter of that name, or its method cannot be generated.
    """
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if config is None or is_plain_lora(config):
        return AdapterLayout.from_model(model, adapter_name)
    shapes = {key: tuple(value.shape) for key, value in trained_tensors(model, adapter_name).items()}
    return method_layout(config, shapes)


def layout_from_shapes(shapes: Mapping[str, tuple[int, ...]], folder: PathLike, source: str) -> AdapterLayout:
    """The layout of tensors of these on-disk keys and shapes, with the configuration that lies in a folder."""
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file() or _is_plain(read_json(path)):
        return AdapterLayout.from_shapes(shapes, read_lora_config(path), source=source)
    config = read_peft_config(folder)
    return method_layout(config, without_the_given(shapes, config))


def layout_from_dict(data: Mapping[str, Any]) -> AdapterLayout:
    """Rebuild a layout from its `to_dict`.

    Raises:
        LayoutError: If a field is missing, unknown or of the wrong form.
    """
    if not isinstance(data, Mapping) or "settings" not in data:
        return AdapterLayout.from_dict(data)
    try:
        rest = dict(data)
        settings, tensors = dict(rest.pop("settings")), rest.pop("tensors")
        config_from(settings)  # that PEFT knows the method
        entries = tuple(method_tensor(key, tuple(map(int, shape))) for key, shape in tensors)
        return MethodLayout(
            modules=(), task_type=settings.get("task_type"), settings=settings, entries=entries, **rest
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"This is no adapter layout as to_dict writes it: {error!r}.") from error


def live_tensors(model: nn.Module, adapter_name: str) -> Mapping[str, nn.Parameter | Any]:
    """A live adapter's tensors, the parameters themselves, under their on-disk keys."""
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if config is None or is_plain_lora(config):
        return live_state_dict(model, adapter_name)
    return trained_tensors(model, adapter_name)


def _is_plain(data: Any) -> bool:
    """Whether it is plain LoRA's, or nothing that PEFT wrote: then LoRA's reader says what is wrong."""
    if not isinstance(data, dict) or "peft_type" not in data:
        return True
    return is_plain_lora(data)
