# SPDX-License-Identifier: Apache-2.0
"""What the library knows of LoRA as PEFT stores it on disk and holds it in memory. Nothing of ours is in here."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import LayoutError, MissingFileError, WeightValueError
from ..storage.files import PathLike, read_json
from .patterns import check_pattern, check_targets


ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_KEY_SUFFIXES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
_KEY_PATTERN = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")

# What a LoRA adapter may carry besides its A and B matrices: a generator cannot write it.
_UNSUPPORTED_FIELDS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "ensure_weight_tying",
)
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def matrix_keys(module: str, kind: str) -> tuple[str, str]:
    """The on-disk keys of a module's A and B.

    >>> matrix_keys("layers.0.q_proj", "linear")[0]
    'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    suffix_a, suffix_b = _KEY_SUFFIXES[kind]
    return f"{KEY_PREFIX}{module}.{suffix_a}", f"{KEY_PREFIX}{module}.{suffix_b}"


def parse_key(key: str, source: str) -> tuple[str, str, str]:
    """Split an on-disk key into the module's name, the side (`"A"` or `"B"`) and the kind.

    Raises:
        LayoutError: If it is not the key of a LoRA matrix.
    """
    match = _KEY_PATTERN.fullmatch(key)
    if match is None:
        raise LayoutError(
            f"{source} holds {key!r}, which is no LoRA matrix. A generator writes lora_A and lora_B only: train the "
            "adapter without modules_to_save, DoRA or trained biases."
        )
    if not key.startswith(KEY_PREFIX):
        raise LayoutError(
            f"{source} holds {key!r}; PEFT's keys start with {KEY_PREFIX!r}. Save the adapter with save_pretrained."
        )
    kind = "linear" if match["linear"] else "embedding"
    return match["module"].removeprefix(KEY_PREFIX), match[kind], kind


def read_lora_config(path: PathLike) -> LoraConfig:
    """Read an `adapter_config.json`, of any PEFT version, as a `LoraConfig`.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it is not JSON.
        LayoutError: If it describes something other than LoRA.
    """
    if not Path(path).is_file():
        raise MissingFileError(
            f"There is no {Path(path).name} in {str(Path(path).parent)!r}. Expected the folder of a LoRA adapter as "
            "PEFT's save_pretrained writes it."
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        found = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise LayoutError(
            f"{str(path)!r} has peft_type {found!r:.100}; expected 'LORA'. Only LoRA adapters can be used."
        )
    # Other PEFT versions write fields that this one does not know; none of those changes the matrices' meaning as
    # long as the unsupported ones are refused below.
    known = {field.name for field in fields(LoraConfig) if field.init} - {"peft_type", "auto_mapping"}
    active = sorted(name for name in _UNSUPPORTED_FIELDS if name not in known and data.get(name))
    if active:
        raise LayoutError(f"{str(path)!r} sets {active[0]}={data[active[0]]!r:.100}, which a generator cannot write.")
    try:
        config = LoraConfig(**{name: value for name, value in data.items() if name in known})
        _check_values(config)
    except Exception as error:  # PEFT takes every value for good, and fails wherever it happens to use it
        raise LayoutError(
            f"{str(path)!r} holds what is no value of a LoRA configuration ({type(error).__name__}: {error!s:.200}). "
            "Save the adapter again with PEFT's save_pretrained."
        ) from error
    return config


def _check_values(config: LoraConfig) -> None:
    check_targets(config.target_modules)
    check_targets(config.exclude_modules)
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(getattr(config, name), str | None):
            raise TypeError(f"{name} must be a text, found {getattr(config, name)!r:.80}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name) or {}
        for key, value in pattern.items():
            check_pattern(key)
            _check_number(f"{name}[{key!r}]", value)
    _check_number("lora_alpha", config.lora_alpha)
    _check_number("r", config.r)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**62:
        raise TypeError(f"{name} must be a number, found {value!r:.80}")


def check_supported(config: LoraConfig, source: str) -> None:
    """Make sure that A and B matrices are all there is to an adapter of this configuration.

    Raises:
        LayoutError: Otherwise; it names the field and the mend.
    """
    active = [name for name in _UNSUPPORTED_FIELDS if getattr(config, name, None)]
    if config.bias != "none":
        active.append("bias")
    if active:
        raise LayoutError(
            f"{source} sets {active[0]}={getattr(config, active[0])!r:.100}. A generator writes the A and B matrices "
            f"of plain LoRA and nothing else: use an adapter without {active[0]}."
        )
    check_initialisation(config, source)


def check_initialisation(config: LoraConfig, source: str) -> None:
    """Make sure that an adapter was not started in a way that changes the base model's weights.

    Raises:
        LayoutError: Otherwise.
    """
    initialisation = str(config.init_lora_weights).lower()
    if initialisation.startswith(_BASE_CHANGING_INITIALISATIONS):
        raise LayoutError(
            f"{source} was initialised with init_lora_weights={config.init_lora_weights!r:.100}, which changes the "
            "base model's weights too, so its matrices mean nothing on the base alone. Convert it when saving "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) or train with the default."
        )


def check_tensor(tensor: torch.Tensor, key: str, shape: tuple[int, ...], source: str) -> None:
    """Make sure that a tensor has its shape and holds finite numbers.

    Raises:
        LayoutError: If the shape differs.
        WeightValueError: If it is on the meta device, or holds NaN or infinity.
    """
    if tuple(tensor.shape) != shape:
        raise LayoutError(f"{source} holds {key!r} with shape {tuple(tensor.shape)}; expected {shape}.")
    if tensor.is_meta:
        raise WeightValueError(f"{source} holds {key!r} on the meta device, without values. Load real weights first.")
    if not tensor.is_floating_point():
        raise WeightValueError(
            f"{source} holds {key!r} as {tensor.dtype}; expected floating-point numbers. Save the adapter again in "
            "one of torch's floating-point types."
        )
    # The types of 8 bits and fewer have no such test.
    finite = torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not finite.all():
        count = int((~finite).sum())
        raise WeightValueError(
            f"{source} holds {count} NaN or infinite number(s) in {key!r}. Its training has diverged: leave this "
            "adapter out, or train it again with a smaller learning rate."
        )


def alpha_of(config: LoraConfig, module: str) -> float:
    """A module's alpha, `alpha_pattern` included, found as PEFT itself finds it."""
    pattern = config.alpha_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), config.lora_alpha)


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers of a live model that hold the adapter, under their names in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
        ):
            yield name.removeprefix(KEY_PREFIX), module


def live_matrices(layer: LoraLayer, adapter_name: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A live layer's kind, A and B; the tensors are the parameters themselves."""
    if adapter_name in layer.lora_embedding_A:
        return "embedding", layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    matrix_a, matrix_b = (matrices[adapter_name].get_parameter("weight") for matrices in (layer.lora_A, layer.lora_B))
    return "linear", matrix_a, matrix_b


def live_state_dict(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The LoRA matrices of a live model under their on-disk keys; the tensors are the parameters themselves.

    Unlike PEFT's `get_peft_model_state_dict` this asks nothing of the Hub and adds no embedding weights.
    """
    state: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model, adapter_name):
        kind, matrix_a, matrix_b = live_matrices(layer, adapter_name)
        state.update(zip(matrix_keys(name, kind), (matrix_a, matrix_b), strict=True))
    return state


def inject_on_meta(lora_config: LoraConfig, base_model: nn.Module) -> nn.Module:
    """A copy of the base model on the meta device with the LoRA layers of a configuration in it.

    No weight is copied: the base may be as large as it likes. Neither argument is changed.
    """
    config = copy.deepcopy(lora_config)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base_model, "name_or_path", None) or None
    skeleton: Any = inject_adapter_in_model(config, on_meta(base_model), "default", low_cpu_mem_usage=True)
    skeleton.peft_config = {"default": config}
    return skeleton


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; no weight is copied."""
    # deepcopy takes what its memo already has for an object, so that it finds an empty stand-in for every tensor.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        stand_in = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        # PEFT reads from quantised weights how they were quantised.
        vars(stand_in).update(vars(parameter))
        memo[id(parameter)] = stand_in
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's structure whose weights are the model's own, but for being frozen: no weight is copied."""
    # deepcopy takes what its memo already has for an object.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised kinds carry more than their data, and are frozen anyway
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo)
