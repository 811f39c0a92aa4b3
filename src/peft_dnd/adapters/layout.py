# SPDX-License-Identifier: Apache-2.0
"""What tensors a LoRA adapter consists of: names, roles, shapes, ranks and scalings, in one fixed order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from ..errors import LayoutError, MissingFileError
from ..storage.files import PathLike, read_safetensors_shapes
from .lora import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    alpha_of,
    check_supported,
    check_tensor,
    inject_on_meta,
    live_matrices,
    lora_layers,
    matrix_keys,
    parse_key,
    read_lora_config,
)
from .names import natural_key
from .patterns import check_targets


# Beyond all sense, and what arithmetic in 64 bits can hold: a file that says so is damaged, or lies.
_TOO_LARGE = 2**62


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: a pair of matrices and the factor between them.

    Attributes:
        name: The module's path in the base model, without PEFT's `base_model.model.` prefix.
        kind: `"linear"` (also `Conv1D` and convolutions) or `"embedding"`, which PEFT stores under other key names.
        shape_a: Shape of A: `(rank, in_features)`, more axes for convolutions; `(rank, num_embeddings)` for an
            embedding.
        shape_b: Shape of B: `(out_features, rank)`, more axes for convolutions.
        alpha: LoRA's numerator alpha.
    """

    name: str
    kind: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank r of the update B A."""
        return self.shape_a[0]

    @property
    def tensors(self) -> tuple[LoraTensor, LoraTensor]:
        """A, then B."""
        key_a, key_b = matrix_keys(self.name, self.kind)
        return (
            LoraTensor(key=key_a, module=self.name, side="A", shape=self.shape_a, rank=self.rank),
            LoraTensor(key=key_b, module=self.name, side="B", shape=self.shape_b, rank=self.rank),
        )


@dataclass(frozen=True)
class LoraTensor:
    """One matrix of an adapter.

    Attributes:
        key: Its key in PEFT's `adapter_model.safetensors`.
        module: The path of the module that it belongs to.
        side: `"A"` (rank first) or `"B"` (rank second).
        shape: Its shape as stored.
        rank: The rank r.
    """

    key: str
    module: str
    side: str
    shape: tuple[int, ...]
    rank: int

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def long_size(self) -> int:
        """How many numbers belong to each rank: the length of the side that is not the rank."""
        return self.num_parameters // self.rank

    def find_in(self, state_dict: Mapping[str, torch.Tensor], *, batched: bool = False) -> torch.Tensor:
        """The matrix in a state dict; where `batched`, leading batch axes may stand before its own.

        Raises:
            LayoutError: If it is missing or has another shape.
        """
        found = state_dict.get(self.key)
        if found is None or tuple(found.shape[-len(self.shape) :] if batched else found.shape) != self.shape:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise LayoutError(f"The adapter does not fit its layout: {self.key!r} {what}; expected {self.shape}.")
        return found


@dataclass(frozen=True)
class AdapterLayout:
    """The ordered description of every tensor of a LoRA adapter, from which all else is derived.

    The order is the natural order of the module names (`layers.2` before `layers.10`), A before B, whatever the source
    the layout was read from. Two adapters are interchangeable for a generator if and only if
    [`difference`][AdapterLayout.difference] between their layouts is `None`.

    Attributes:
        modules: The adapted modules in natural order of their names.
        target_modules: What a `LoraConfig` needs in order to target just these modules (suffixes or a regular
            expression), or `None` if only their full names do.
        use_rslora: Whether the scaling is alpha / sqrt(r) rather than alpha / r.
        fan_in_fan_out: Whether the base stores its weights transposed, as GPT-2's `Conv1D` does.
        task_type: PEFT's task type, e.g. `"CAUSAL_LM"`, or `None`.
        base_model_name_or_path: The base model that the adapter belongs to, if known. Not compared.
        base_model_revision: And its commit, branch or tag on the Hub. Not compared.
    """

    modules: tuple[LoraModule, ...]
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise LayoutError("An adapter layout needs at least one adapted module, and got none.")
        for module in self.modules:
            _check_module(module)
        ordered = tuple(sorted(self.modules, key=lambda module: natural_key(module.name)))
        object.__setattr__(self, "modules", ordered)
        for name in ("task_type", "base_model_name_or_path", "base_model_revision"):
            if not isinstance(getattr(self, name), str | None):
                raise LayoutError(f"{name} must be a text or None, got {getattr(self, name)!r:.80}.")

    @classmethod
    def from_folder(cls, folder: PathLike) -> AdapterLayout:
        """Read the layout of an adapter that PEFT saved, from its headers alone.

        Args:
            folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            CorruptFileError: If one of them is unreadable, for instance cut short.
            LayoutError: If it is no LoRA adapter, or holds what a generator cannot write (DoRA, trained biases,
                `modules_to_save`, ...).
        """
        weights = Path(folder) / ADAPTER_WEIGHTS_NAME
        if not weights.is_file():
            raise MissingFileError(
                f"There is no {ADAPTER_WEIGHTS_NAME} in {str(folder)!r}. Expected the folder of a LoRA adapter as "
                "PEFT's save_pretrained writes it, in safetensors format."
            )
        config = read_lora_config(Path(folder) / ADAPTER_CONFIG_NAME)
        return cls.from_shapes(read_safetensors_shapes(weights), config, source=str(folder))

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig, *, source: str = "the adapter"
    ) -> AdapterLayout:
        """Build the layout from the keys and shapes of a PEFT state dict and the configuration it was saved with.

        Args:
            shapes: On-disk key -> shape.
            config: The adapter's LoRA configuration.
            source: What to call the adapter in errors.

        Raises:
            LayoutError: If a key is no LoRA matrix, a pair is incomplete, or shapes contradict the configuration.
        """
        check_supported(config, source)
        pairs: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for key, shape in shapes.items():
            if ".base_layer." in key:
                continue  # PEFT saves targeted embeddings' frozen base weights along; they are the base model's.
            module, side, kind = parse_key(key, source)
            pairs.setdefault(module, {})[side] = (kind, shape)
        modules = []
        for name, pair in pairs.items():
            if set(pair) != {"A", "B"}:
                raise LayoutError(f"In {source}, module {name!r} has matrix {min(pair)} but not its partner.")
            (kind, shape_a), (_, shape_b) = pair["A"], pair["B"]
            modules.append(LoraModule(name, kind, shape_a, shape_b, alpha_of(config, name)))
        return cls(modules=tuple(modules), **_shared_fields(config))

    @classmethod
    def from_model(cls, model: nn.Module, adapter_name: str = "default") -> AdapterLayout:
        """Read the layout of an adapter from a live model: a `PeftModel` or a model with injected adapters.

        Args:
            model: The model.
            adapter_name: Which of its adapters.

        Raises:
            LayoutError: If the model has no LoRA adapter of that name.
        """
        configs = getattr(model, "peft_config", {})
        if adapter_name not in configs:
            raise LayoutError(
                f"The model has no adapter named {adapter_name!r}; it has {sorted(configs) or 'none'}. "
                "Name one of them, or add an adapter first."
            )
        config = configs[adapter_name]
        if not isinstance(config, LoraConfig):
            raise LayoutError(f"Adapter {adapter_name!r} is a {type(config).__name__}; expected a LoRA adapter.")
        check_supported(config, f"adapter {adapter_name!r}")
        modules = []
        for name, layer in lora_layers(model, adapter_name):
            kind, matrix_a, matrix_b = live_matrices(layer, adapter_name)
            alpha = layer.lora_alpha[adapter_name]
            modules.append(LoraModule(name, kind, tuple(matrix_a.shape), tuple(matrix_b.shape), alpha))
        fields = _shared_fields(config)
        # PEFT records the base's name by itself, its revision only if it is told. transformers knows what it loaded.
        if fields["base_model_revision"] is None and _named_as(model, config.base_model_name_or_path):
            fields["base_model_revision"] = getattr(getattr(model, "config", None), "_commit_hash", None)
        return cls(modules=tuple(modules), **fields)

    @classmethod
    def from_lora_config(cls, lora_config: LoraConfig, base_model: nn.Module) -> AdapterLayout:
        """Work out the layout that a LoRA configuration gives on a base model, which may be on the meta device.

        Neither argument is changed and no weight is copied.

        Args:
            lora_config: The configuration.
            base_model: The base model.

        Raises:
            LayoutError: If the configuration asks for what a generator cannot write.
            ValueError: PEFT's own, if no module matches `target_modules`.
        """
        check_supported(lora_config, "the LoRA configuration")
        return cls.from_model(inject_on_meta(lora_config, base_model))

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return "LORA"

    def in_words(self) -> str:
        """What it is, in a few words."""
        return f"{len(self.modules)} modules, rank up to {self.max_rank}"

    def check_plain_lora(self, what: str) -> None:
        """Make sure that these are A and B matrices and nothing else.

        Args:
            what: What needs them, for the message.

        Raises:
            LayoutError: Otherwise.
        """
        if not self.modules:
            raise LayoutError(f"{what} is for plain LoRA; this is the layout of a {self.method} adapter.")

    @cached_property
    def tensors(self) -> tuple[LoraTensor, ...]:
        """All tensors: module by module, A before B."""
        return tuple(tensor for module in self.modules for tensor in module.tensors)

    @property
    def num_parameters(self) -> int:
        """How many numbers an adapter of this layout holds."""
        return sum(tensor.num_parameters for tensor in self.tensors)

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    def scaling(self, module: LoraModule) -> float:
        """The factor s in W + s B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        return module.alpha / (math.sqrt(module.rank) if self.use_rslora else module.rank)

    def difference(self, other: AdapterLayout) -> str | None:
        """Say in words what first distinguishes another layout from this one; `None` if an adapter fits both."""
        mine, theirs = ({module.name: module for module in layout.modules} for layout in (self, other))
        for name in {**mine, **theirs}:
            if name not in theirs:
                return f"module {name!r} is adapted in the first and not in the second"
            if name not in mine:
                return f"module {name!r} is adapted in the second and not in the first"
        for name, module in mine.items():
            for field in ("kind", "rank", "shape_a", "shape_b", "alpha"):
                first, second = getattr(module, field), getattr(theirs[name], field)
                if first != second:
                    return f"module {name!r} has {field} {first} in the first and {second} in the second"
        if self.use_rslora != other.use_rslora:
            return f"use_rslora is {self.use_rslora} in the first and {other.use_rslora} in the second"
        return None

    def check_state_dict(self, state_dict: Mapping[str, torch.Tensor], *, source: str = "the state dict") -> None:
        """Make sure that a state dict holds just this layout's tensors, in shape and finite.

        Args:
            state_dict: PEFT on-disk key -> tensor.
            source: What to call it in errors.

        Raises:
            LayoutError: If a key is missing or unknown, or a shape differs; the first such key is named.
            WeightValueError: If a tensor is on the meta device or holds NaN or infinity.
        """
        expected = {tensor.key: tensor.shape for tensor in self.tensors}
        for key, shape in expected.items():
            if key not in state_dict:
                raise LayoutError(f"{source} lacks {key!r}, which the layout has with shape {shape}.")
            check_tensor(state_dict[key], key, shape, source)
        unknown = [key for key in state_dict if key not in expected and ".base_layer." not in key]
        if unknown:
            raise LayoutError(f"{source} holds {unknown[0]!r}, which is not in the layout ({len(unknown)} such keys).")

    def lora_config(self, rename: Mapping[str, str] | None = None) -> LoraConfig:
        """Write the plain PEFT configuration that recreates this layout.

        Args:
            rename: Layout module name -> name in the base model at hand, where that differs (a bare or a
                differently headed model). Only matters for layouts that need full names.
        """
        names = {module.name: (rename or {}).get(module.name, module.name) for module in self.modules}
        rank = _most_common(module.rank for module in self.modules)
        alpha = _most_common(module.alpha for module in self.modules)
        targets = self.target_modules if self.target_modules is not None else tuple(names.values())
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            rank_pattern={re.escape(names[m.name]): m.rank for m in self.modules if m.rank != rank},
            alpha_pattern={re.escape(names[m.name]): m.alpha for m in self.modules if m.alpha != alpha},
            use_rslora=self.use_rslora,
            fan_in_fan_out=self.fan_in_fan_out,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.base_model_revision,
        )

    def peft_config(self, rename: Mapping[str, str] | None = None) -> PeftConfig:
        """A new plain PEFT configuration that recreates this layout; see [`lora_config`]."""
        return self.lora_config(rename)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which [`from_dict`][AdapterLayout.from_dict] rebuilds the layout."""
        return {
            "modules": [[m.name, m.kind, list(m.shape_a), list(m.shape_b), m.alpha] for m in self.modules],
            "target_modules": list(self.target_modules)
            if isinstance(self.target_modules, tuple)
            else self.target_modules,
            "use_rslora": self.use_rslora,
            "fan_in_fan_out": self.fan_in_fan_out,
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            # Earlier versions refuse what they do not know.
            **({"base_model_revision": self.base_model_revision} if self.base_model_revision is not None else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterLayout:
        """Rebuild a layout from [`to_dict`][AdapterLayout.to_dict].

        Raises:
            LayoutError: If a field is missing, unknown or of the wrong form.
        """
        try:
            fields = dict(data)
            modules = tuple(
                LoraModule(name, kind, tuple(shape_a), tuple(shape_b), alpha)
                for name, kind, shape_a, shape_b, alpha in fields.pop("modules")
            )
            targets = fields.pop("target_modules")
            check_targets(targets)
            return cls(modules, tuple(targets) if isinstance(targets, list) else targets, **fields)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"This is no adapter layout as to_dict writes it: {error!r:.200}.") from error


def _check_module(module: LoraModule) -> None:
    sizes = (*module.shape_a, *module.shape_b)
    whole = all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < _TOO_LARGE for size in sizes)
    if not isinstance(module.name, str) or not whole or math.prod(sizes) > _TOO_LARGE:
        raise LayoutError(
            f"This is no LoRA module: name {module.name!r:.80}, A {module.shape_a!r:.80}, B {module.shape_b!r:.80}. "
            "Expected a text and two shapes of integers."
        )
    if (
        isinstance(module.alpha, bool)
        or not isinstance(module.alpha, int | float)
        or not abs(module.alpha) < _TOO_LARGE
    ):
        raise LayoutError(f"Module {module.name!r} has alpha {module.alpha!r:.80}; expected a finite number.")
    rank_of_b = module.shape_b[1] if len(module.shape_b) > 1 else 0
    if module.kind not in ("linear", "embedding") or len(module.shape_a) < 2 or rank_of_b != module.rank:
        raise LayoutError(
            f"Module {module.name!r} is no LoRA pair: A has shape {module.shape_a} and B {module.shape_b} (kind "
            f"{module.kind!r}); expected A (r, in, ...) and B (out, r, ...) with one r."
        )
    if 0 in module.shape_a + module.shape_b:
        raise LayoutError(
            f"Module {module.name!r} has an empty matrix: A {module.shape_a}, B {module.shape_b}. DeepSpeed ZeRO-3 "
            "leaves such placeholders; gather the parameters before saving."
        )


def _shared_fields(config: LoraConfig) -> dict[str, Any]:
    full_names_only = config.layers_to_transform is not None or config.exclude_modules
    targets = None if full_names_only else config.target_modules
    task_type = config.task_type
    return {
        "target_modules": tuple(sorted(targets)) if isinstance(targets, (set, list, tuple)) else targets,
        "use_rslora": bool(config.use_rslora),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
        "task_type": getattr(task_type, "value", task_type),
        "base_model_name_or_path": config.base_model_name_or_path,
        "base_model_revision": config.revision,
    }


def _named_as(model: nn.Module, name: str | None) -> bool:
    return name is not None and getattr(getattr(model, "config", None), "_name_or_path", None) == name


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
