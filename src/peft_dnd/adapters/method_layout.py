# SPDX-License-Identifier: Apache-2.0
"""`MethodLayout`: the tensors of an adapter of any of PEFT's methods, read off the state dict that PEFT itself gives.

There is no class for each method and no list of their tensors: what a generator writes are the entries of PEFT's state
dict that are trainable parameters. So it goes for DoRA, IA3, VeRA, LoHa, LoKr, OFT, FourierFT, tuned norms, trainable
tokens, soft prompts, and for LoRA with biases or whole modules beside, today's methods and later ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..errors import LayoutError
from ..storage.files import PathLike, read_json, read_safetensors, read_safetensors_shapes
from .layout import AdapterLayout, LoraTensor
from .lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, KEY_PREFIX, check_initialisation, on_meta
from .names import natural_key


_NAME = "default"
SOFT_PROMPT = "prompt_embeddings"
# A matrix has its shorter side as its rows in a token, up to so many; any other tensor is one row.
_MOST_ROWS = 64
# What says where a configuration comes from or what is being done with it, and nothing of the adapter's form.
_NOT_OF_THE_FORM = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "runtime_config",
    "peft_version",
    # PEFT reads these off the base.
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
)
_SOFT_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING")
# Projections that are drawn from a seed in the configuration, and saved along if it says so.
_DRAWN = ("vera_A", "vera_B", "randlora_A", "randlora_B")
# How an adapter begins before it is trained; what it then is stands in its tensors.
_OF_THE_START = (
    "save_projection",
    "init_weights",
    "init_lora_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
)


@dataclass(frozen=True)
class MethodLayout(AdapterLayout):
    """The layout of an adapter that is no plain LoRA.

    Made by [`AdapterLayout.from_peft_config`], `from_folder` or `from_model`.

    Attributes:
        settings: The method's PEFT configuration, as JSON knows it, without what says nothing of the adapter's form.
        entries: The adapter's tensors, in natural order of their keys.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[LoraTensor, ...] = ()

    def __post_init__(self) -> None:
        if not self.entries:
            raise LayoutError(f"A {self.method} adapter needs at least one trained tensor, and got none.")
        ordered = tuple(sorted(self.entries, key=lambda tensor: natural_key(tensor.key)))
        object.__setattr__(self, "entries", ordered)

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as `"IA3"`."""
        return str(self.settings.get("peft_type"))

    @property
    def is_soft_prompt(self) -> bool:
        """Whether it stands before a model's input rather than in its layers."""
        return self.method in _SOFT_PROMPTS

    def in_words(self) -> str:
        """What it is, in a few words."""
        return f"{self.method}, {len(self.entries)} tensors"

    @property
    def tensors(self) -> tuple[LoraTensor, ...]:
        """All tensors, in natural order of their keys."""
        return self.entries

    @property
    def max_rank(self) -> int:
        """The most rows of any tensor in a token."""
        return max(tensor.rank for tensor in self.entries)

    def difference(self, other: AdapterLayout) -> str | None:
        """Say in words what first distinguishes another layout from this one; `None` if an adapter fits both."""
        if not isinstance(other, MethodLayout):
            return f"the first is a {self.method} adapter and the second plain LoRA"
        mine, theirs = (_form(layout.settings) for layout in (self, other))
        for name in sorted({**mine, **theirs}, key=lambda name: name != "peft_type"):
            if mine.get(name) != theirs.get(name):
                return f"{name} is {mine.get(name)!r} in the first and {theirs.get(name)!r} in the second"
        shapes, others = ({tensor.key: tensor.shape for tensor in layout.entries} for layout in (self, other))
        for key in {**shapes, **others}:
            if shapes.get(key) != others.get(key):
                return f"{key!r} is {shapes.get(key)} in the first and {others.get(key)} in the second"
        return None

    def peft_config(self, rename: Mapping[str, str] | None = None) -> PeftConfig:
        """A new PEFT configuration of the method, with `inference_mode=False`."""
        return config_from(dict(self.settings), base=self.base_model_name_or_path)

    def lora_config(self, rename: Mapping[str, str] | None = None) -> Any:
        """There is none.

        Raises:
            LayoutError: Always: it is no plain LoRA.
        """
        raise LayoutError(f"A {self.method} adapter has no plain LoRA configuration. Use peft_config().")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which [`AdapterLayout.from_dict`] rebuilds the layout."""
        return {
            "settings": dict(self.settings),
            "tensors": [[tensor.key, list(tensor.shape)] for tensor in self.entries],
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_model_revision": self.base_model_revision,
        }


def method_layout(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> MethodLayout:
    """The layout of an adapter of a configuration with tensors of these on-disk keys and shapes."""
    _check_method(config)
    settings = settings_of(config)
    return MethodLayout(
        modules=(),
        task_type=settings.get("task_type"),
        base_model_name_or_path=config.base_model_name_or_path,
        settings=settings,
        entries=tuple(method_tensor(key, shape) for key, shape in shapes.items()),
    )


def _check_method(config: PeftConfig) -> None:
    if isinstance(config, LoraConfig):
        check_initialisation(config, "The adapter's configuration")
    kind = _type_of(config)
    if getattr(config, "prefix_projection", False) or (config.is_prompt_learning and kind not in _SOFT_PROMPTS):
        raise LayoutError(
            f"A {kind} adapter trains an encoder of its own, of which PEFT saves the output alone. Use prompt tuning, "
            "or prefix tuning without prefix_projection."
        )


def method_layout_from_config(config: PeftConfig, base_model: nn.Module) -> MethodLayout:
    """Work out the layout that a configuration gives on a base model; neither is changed, no weight is copied.

    Raises:
        LayoutError: If the method keeps what it has learned elsewhere than in trainable tensors of its state dict.
    """
    _check_method(config)
    config = _plain(config)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base_model, "name_or_path", None) or None
    try:
        with _quiet(), torch.device("meta"):
            skeleton = get_peft_model(on_meta(base_model), config, _NAME)
    except (NotImplementedError, RuntimeError) as error:
        raise LayoutError(
            f"A {_type_of(config)} adapter takes its form from the base's weights, or cannot be laid out without them "
            f"({str(error).splitlines()[0][:120]}). Use another method."
        ) from error
    shapes = {key: tuple(value.shape) for key, value in trained_tensors(skeleton, _NAME).items()}
    return method_layout(config, shapes)


def method_layout_from_folder(folder: PathLike, config: PeftConfig) -> MethodLayout:
    """Read the layout of an adapter that PEFT saved, from its headers."""
    path = Path(folder) / ADAPTER_WEIGHTS_NAME
    shapes = without_the_given(read_safetensors_shapes(path), config)
    tokens = sorted(key for key in shapes if key.endswith(".trainable_tokens_delta"))
    if len(tokens) > 1:  # which of them are those of tied weights, only their values tell
        values = read_safetensors(path)
        for number, key in enumerate(tokens):
            if any(torch.equal(values[key], values[other]) for other in tokens[number + 1 :]):
                del shapes[key]
    return method_layout(_plain(config), shapes)


def trained_tensors(model: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    """The trained tensors of a live adapter, by their on-disk keys; they are the model's own parameters.

    Args:
        model: A `PeftModel`, its tuner, or a model with injected adapters.
        adapter_name: The adapter's name.

    Raises:
        LayoutError: If the adapter has learned something that PEFT does not save as it is.
    """
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return {SOFT_PROMPT: _soft_prompt(model, adapter_name)}
    if isinstance(model, BaseTuner):
        model = _AsInPeftModel(model)
    prefix = "" if isinstance(model, (PeftModel, _AsInPeftModel)) else KEY_PREFIX
    with _quiet():
        saved = get_peft_model_state_dict(
            model, model.state_dict(keep_vars=True), adapter_name, save_embedding_layers=False
        )
    trained = without_the_given(saved, config)
    parameters = dict(model.named_parameters())
    known = {id(parameter) for parameter in parameters.values()}
    strange = [key for key, value in trained.items() if id(value) not in known]
    if strange:
        raise LayoutError(
            f"A {_type_of(config)} adapter saves {strange[0]!r}, which is no trained parameter as it stands, so that "
            "it cannot be generated. Use another method."
        )
    kept = {id(value) for value in trained.values()}
    for name, value in parameters.items():
        if adapter_name in name.split(".") and value.requires_grad and id(value) not in kept:
            raise LayoutError(f"PEFT does not save {name!r}, which a {_type_of(config)} adapter trains.")
    # Tied weights have their tokens twice, one parameter under two keys; PEFT saves both, and needs one.
    once = {id(trained[key]): key for key in sorted(trained)}
    return {prefix + key: value for key, value in trained.items() if once[id(value)] == key}


class _AsInPeftModel(nn.Module):
    """A tuner where a `PeftModel` has it, so that all names are as they are there."""

    def __init__(self, tuner: BaseTuner) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def without_the_given(tensors: Mapping[str, Any], config: PeftConfig) -> dict[str, Any]:
    """The entries of a state dict without those that follow from the configuration or are the base model's.

    VeRA's and RandLoRA's shared projections are drawn from a seed that the configuration holds.
    """
    drawn = _DRAWN if getattr(config, "save_projection", None) is not None else ()
    return {
        key: value
        for key, value in tensors.items()
        if ".base_layer." not in key and not any(part in drawn for part in key.split("."))
    }


def is_plain_lora(config: PeftConfig | Mapping[str, Any]) -> bool:
    """Whether a configuration is that of A and B matrices and nothing else."""
    data = config.to_dict() if isinstance(config, PeftConfig) else dict(config)
    if _type_of(data) != "LORA":
        return False
    beside = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
    return not any(data.get(name) for name in beside) and data.get("bias", "none") == "none"


def read_peft_config(folder: PathLike) -> PeftConfig:
    """Read an `adapter_config.json` of any method.

    Raises:
        FileNotFoundError: If there is none.
        CorruptFileError: If it is not JSON.
        LayoutError: If PEFT has no such method.
    """
    return config_from(read_json(Path(folder) / ADAPTER_CONFIG_NAME), source=str(folder))


def config_from(data: Mapping[str, Any], *, base: str | None = None, source: str = "the configuration") -> PeftConfig:
    """A PEFT configuration of what its `to_dict` gave; fields that this version of PEFT lacks are left out.

    Raises:
        LayoutError: If PEFT has no such method, or its configuration no such values.
    """
    found = data.get("peft_type") if isinstance(data, Mapping) else None
    kinds = {str(getattr(kind, "value", kind)): of for kind, of in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(found, str) or found not in kinds:
        raise LayoutError(
            f"{source} has peft_type {found!r}, which the installed PEFT does not know. Known: "
            f"{', '.join(sorted(kinds))}."
        )
    known = kinds[found].__dataclass_fields__
    fields = {
        name: value for name, value in data.items() if name in known and known[name].init and name != "peft_type"
    }
    fields.pop("auto_mapping", None)
    try:
        with _quiet():
            config: PeftConfig = kinds[found](**{**fields, "inference_mode": False})
        settings_of(config)
        if not isinstance(config.base_model_name_or_path, str | None):
            raise TypeError(f"base_model_name_or_path must be a text, found {config.base_model_name_or_path!r:.80}")
    except Exception as error:  # PEFT takes every value for good, and fails wherever it happens to use it
        raise LayoutError(
            f"{source} is no configuration of a {found} adapter ({type(error).__name__}: {error!s:.200}). It was "
            "edited or damaged: save or fetch the adapter again."
        ) from error
    if base is not None:
        config.base_model_name_or_path = base
    return config


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """A configuration as JSON knows it, the same for equal ones, without what says nothing of the adapter's form."""
    return {
        name: _as_json(value)
        for name, value in config.to_dict().items()
        if name not in _NOT_OF_THE_FORM and value is not None
    }


def _form(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _OF_THE_START}


def _as_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    return getattr(value, "value", value)


def _plain(config: PeftConfig) -> PeftConfig:
    """A copy that saves no shared projections, to be trained."""
    config = copy.deepcopy(config)
    config.inference_mode = False
    if getattr(config, "save_projection", None) is not None:
        config.save_projection = False  # type: ignore[attr-defined]
    return config


def _type_of(config: PeftConfig | Mapping[str, Any]) -> str:
    found = config.get("peft_type") if isinstance(config, Mapping) else config.peft_type
    return str(getattr(found, "value", found))


def method_tensor(key: str, shape: tuple[int, ...]) -> LoraTensor:
    """A tensor of a state dict, as it is cut into tokens: a matrix along its longer side, any other in one row."""
    path = key.removeprefix(KEY_PREFIX).removesuffix(".weight")
    if len(shape) == 2 and min(shape) <= _MOST_ROWS:
        return LoraTensor(key, path, "A" if shape[0] <= shape[1] else "B", tuple(shape), min(shape))
    return LoraTensor(key, path, "A", tuple(shape), 1)


def _soft_prompt(model: Any, adapter_name: str) -> nn.Parameter:
    weight: nn.Parameter = model.prompt_encoder[adapter_name].embedding.weight
    return weight


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
