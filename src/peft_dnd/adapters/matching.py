# SPDX-License-Identifier: Apache-2.0
"""Finding a layout's modules in a live base model, and making sure that its matrices fit there. Nothing is changed."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import BaseModelMismatchError
from .layout import AdapterLayout, LoraModule


logger = logging.getLogger(__name__)

_COMPILED = "_orig_mod."
# What transformers calls the text model inside one that reads more than text, and the bare model inside another.
_TEXT_MODELS = ("language_model", "text_model", "text_decoder")
_BARE_MODELS = ("model", "transformer")
_CACHED_REPOSITORY = "models--"


class BaseModelNameWarning(UserWarning):
    """An adapter was fitted for a base model of another name. It fits in every shape, so it may be the same model."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, _COMPILED.removesuffix("."), model)


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside whatever `torch.compile` and PEFT have wrapped around it."""
    model = uncompiled(model)
    if isinstance(model, PeftModel):
        return model.get_base_model()
    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    return model.model if isinstance(model, BaseTuner) else model


def clean_name(name: str) -> str:
    """A module's name without what `torch.compile` puts into it."""
    return name.replace(_COMPILED, "")


def adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model under the names that PEFT knows them by.

    What adapters have put into the model is left out: a module that is adapted already appears once, as LoRA layer.
    """
    inside = None
    for name, module in base_model_of(model).named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
        yield clean_name(name), module


def match_modules(model: nn.Module, layout: AdapterLayout) -> dict[str, str]:
    """Say which module of a model each module of a layout is.

    Heads put their base model under different names: what is `model.layers.0.q_proj` in a causal language model is
    `layers.0.q_proj` in the bare one and `transformer.layers.0.q_proj` under a question-answering head. A name that is
    not in the model as it stands is therefore looked for under a longer path that ends in it, and, with its first
    component dropped, in the bare model or in what the model calls its base model. There must be just one such module.

    A vision-language model has its text model under a name of its own: what is `model.layers.0.q_proj` in the text
    model is `model.language_model.layers.0.q_proj` there. One is looked for in the other, either way round, and where
    modules are found so it is logged.

    Args:
        model: A base model, plain, wrapped by PEFT or compiled.
        layout: The layout.

    Returns:
        Name in the layout -> name in the base model, for each module of the layout.

    Raises:
        BaseModelMismatchError: If a module is missing, or more than one could be meant.
    """
    layout.check_plain_lora("Looking for modules of a base")
    available = {name for name, _ in adaptable_modules(model)}
    prefixes = _bare_model_prefixes(base_model_of(model))
    roots = _text_model_roots(available) or prefixes
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    elsewhere = None
    for module in layout.modules:
        candidates = _find(module.name, available, prefixes)
        if not candidates:
            candidates = _find_in_text_model(module.name, available, roots)
            elsewhere = elsewhere or module
        if len(candidates) != 1:
            raise _mismatch(model, layout, _describe_search(module.name, candidates, available))
        (found,) = candidates
        if found in owners:
            both = f"{owners[found]!r} and {module.name!r}"
            raise _mismatch(model, layout, f"modules {both} of the adapter would both be {found!r} there")
        names[module.name] = found
        owners[found] = module.name
    if elsewhere is not None:
        logger.warning(
            "Modules of the adapter are looked for in the text model of this %s: %r is %r there.",
            type(base_model_of(model)).__name__,
            elsewhere.name,
            names[elsewhere.name],
        )
    return names


def check_fits(model: nn.Module, layout: AdapterLayout, names: Mapping[str, str]) -> None:
    """Make sure that the matrices of a layout have the shapes that the modules of a model need.

    Args:
        model: A base model, plain, wrapped by PEFT or compiled.
        layout: The layout.
        names: What [`match_modules`] gave.

    Raises:
        BaseModelMismatchError: Otherwise; it names the first module, what was expected and what was found.
    """
    available = dict(adaptable_modules(model))
    for module in layout.modules:
        name = names[module.name]
        layer = available[name]
        base_layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        needed, written = _form_of_layer(layer, base_layer), _form_of_matrices(module)
        if needed != written:
            raise _mismatch(
                model,
                layout,
                f"module {name!r} is a {type(base_layer).__name__} {_in_words(needed)}; the adapter's matrices "
                f"A {module.shape_a} and B {module.shape_b} are for {_in_words(written)}",
            )
        weight = getattr(base_layer, "weight", None)
        if weight is not None and weight.is_meta:
            raise _mismatch(
                model,
                layout,
                f"module {name!r} is on the meta device, where no weights can be put. Load the base model's weights "
                "first, without offloading them",
            )


def warn_if_other_base(model: nn.Module, layout: AdapterLayout) -> None:
    """Warn if a layout was read off a base model of another name than the given one's.

    Only the last component of a name counts, so that a local copy of a Hub model, or a snapshot in the Hub's cache,
    has its name; where one of the two has no name there is no warning.
    """
    found = getattr(base_model_of(model), "name_or_path", None)
    expected = layout.base_model_name_or_path
    if found and expected and own_name(found) != own_name(expected):
        warnings.warn(
            f"The adapter was written for the base model {expected!r} and is put on {found!r}. All shapes fit, but "
            "its matrices mean something on the model that the generator was fitted for only. Ignore this if the "
            "two are the same model.",
            BaseModelNameWarning,
            stacklevel=2,
        )


def lora_config_for(
    model: nn.Module,
    layout: AdapterLayout,
    names: Mapping[str, str],
    *,
    settings: Mapping[str, Any] | None = None,
    key_prefix: str = "",
) -> LoraConfig:
    """Write the plain PEFT configuration under which PEFT adapts just the layout's modules in a model.

    The layout's own `target_modules` are kept where they find those modules; otherwise the modules are listed by name.
    So they are, too, where a text model's layout would find modules beside it, of a vision tower for instance.

    Args:
        model: A base model, plain, wrapped by PEFT or compiled.
        layout: The layout.
        names: What [`match_modules`] gave.
        settings: Fields to set beside the layout's, such as `lora_dropout`.
        key_prefix: What PEFT will see before each of the base model's module names.

    Raises:
        BaseModelMismatchError: If PEFT would adapt other modules too, or cannot be made to adapt all.
    """
    keys = [name for name, _ in adaptable_modules(model)]
    wanted = set(names.values())
    beside = _beside_the_text_model(names, keys)
    listed = replace(layout, target_modules=None)
    for candidate in (layout, listed):
        config = candidate.lora_config(names)
        for field, value in (settings or {}).items():
            setattr(config, field, value)
        targeted = {key for key in keys if check_target_module_exists(config, key_prefix + key)}
        if targeted >= wanted and not targeted & beside:
            break
    if targeted == wanted:
        return config
    missed, extra = sorted(wanted - targeted), sorted(targeted - wanted)
    if missed:
        what = f"module {missed[0]!r} cannot be adapted: modules_to_save={config.modules_to_save} covers it"
    else:
        what = (
            f"it has {extra[0]!r} ({len(extra)} such modules), which target_modules={_brief(config.target_modules)} "
            "covers and the adapter does not"
        )
    raise _mismatch(model, layout, what)


def _bare_model_prefixes(base: nn.Module) -> tuple[str, ...]:
    """Where the bare model may sit inside a model: at its top, or where transformers says."""
    prefix = getattr(base, "base_model_prefix", "")
    return ("", f"{prefix}.") if prefix and hasattr(base, prefix) else ("",)


def _find(name: str, available: set[str], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    if name in available:
        return (name,)
    found = {other for other in available if other.endswith(f".{name}")}
    head, _, tail = name.partition(".")
    # A layer's number stays with the list it counts, so that no other list's layer of that number is taken for it.
    if tail and not tail.split(".")[0].isdigit() and not head.isdigit():
        found.update(prefix + tail for prefix in prefixes if prefix + tail in available)
    return tuple(sorted(found))


def _text_models(available: Iterable[str]) -> list[str]:
    """The paths of the text models that a model has as a part."""
    found = {name for name in available if name.rpartition(".")[2] in _TEXT_MODELS}
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def _text_model_roots(available: set[str]) -> tuple[str, ...]:
    """Where modules of the text model may begin, in a model that has one as a part; empty for any other."""
    inside = ("", *(f"{bare}." for bare in _BARE_MODELS))
    return tuple(f"{name}.{inner}" for name in _text_models(available) for inner in inside)


def _beside_the_text_model(names: Mapping[str, str], available: Iterable[str]) -> set[str]:
    """The modules outside of the text model that a text model's own adapter was found in; empty for other adapters."""
    for root in _text_models(available):
        found = {name for name, there in names.items() if there.startswith(f"{root}.")}
        if len(found) == len(names) and not any(part in _TEXT_MODELS for name in found for part in name.split(".")):
            return {name for name in available if not name.startswith(f"{root}.")}
    return set()


def _find_in_text_model(name: str, available: set[str], roots: tuple[str, ...]) -> tuple[str, ...]:
    """Modules that stand in a model's text model where this one stands in its own."""
    parts = name.split(".")
    inside = max((number for number, part in enumerate(parts) if part in _TEXT_MODELS), default=-1)
    tail = parts[inside + 1 :]
    if tail[:1] and tail[0] in _BARE_MODELS:
        tail = tail[1:]
    elif inside < 0:
        return ()  # nothing says that it belongs to a text model
    return tuple(sorted({root + ".".join(tail) for root in roots} & available))


def _describe_search(name: str, found: tuple[str, ...], available: set[str]) -> str:
    if found:
        return f"module {name!r} of the adapter could be {found[0]!r} or {found[1]!r} there"
    last = name.rpartition(".")[2]
    alike = sorted(other for other in available if other.rpartition(".")[2] == last)
    nearest = (
        f"the modules there called {last!r} start with {alike[0]!r}" if alike else f"none there is called {last!r}"
    )
    return f"it has no module {name!r}; {nearest}"


def _form_of_layer(layer: nn.Module, base_layer: nn.Module) -> tuple[Any, ...]:
    kernel = getattr(base_layer, "kernel_size", ())
    kind = "embedding" if isinstance(base_layer, nn.Embedding) else "linear"
    if not isinstance(layer, LoraLayer):
        # PEFT's own reading of the many kinds of layers, quantised ones included. It warns of kinds that it does not
        # know, and will do so again when it adapts them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = LoraLayer(base_layer)  # type: ignore[assignment]
    return kind, layer.in_features, layer.out_features, kernel


def _form_of_matrices(module: LoraModule) -> tuple[Any, ...]:
    return module.kind, module.shape_a[1], module.shape_b[0], module.shape_a[2:]


def _in_words(form: tuple[Any, ...]) -> str:
    kind, size_in, size_out, kernel = form
    ends = f"from {size_in} to {size_out}" + (f" with kernel {kernel}" if kernel else "")
    return f"embedding {ends}" if kind == "embedding" else ends


def _mismatch(model: nn.Module, layout: AdapterLayout, what: str) -> BaseModelMismatchError:
    base = base_model_of(model)
    name = getattr(base, "name_or_path", None)
    called = f"{type(base).__name__} {name!r}" if name else type(base).__name__
    fitted = f" ({layout.base_model_name_or_path!r})" if layout.base_model_name_or_path else ""
    return BaseModelMismatchError(
        f"The adapter does not fit this {called}: {what}. The model is untouched. Use the base model that the "
        f"generator was fitted for{fitted}, or a generator fitted for this one."
    )


def own_name(name_or_path: str) -> str:
    """The last component of a model's name or path, or the repository's of a snapshot in the Hub's cache.

    >>> own_name("Qwen/Qwen2.5-0.5B"), own_name("/models/Qwen2.5-0.5B/")
    ('Qwen2.5-0.5B', 'Qwen2.5-0.5B')
    """
    parts = re.split(r"[\\/]+", name_or_path.rstrip("\\/"))
    cached = [part for part in parts if part.startswith(_CACHED_REPOSITORY)]
    return cached[-1].rpartition("--")[2] if cached else parts[-1]


def _brief(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) or len(targets) <= 8 else f"<{len(targets)} names>"
