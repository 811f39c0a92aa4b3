# SPDX-License-Identifier: Apache-2.0
"""Decoders of several bases: which parts of a decoder belong to the base, its head, and the rest, a trunk, shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..errors import GeneratorConfigError


@runtime_checkable
class HeadedDecoder(Protocol):
    """A decoder of which some submodules are made for the base, and all else can be shared between bases."""

    head_modules: tuple[str, ...]
    """The names of these submodules; one that a decoder's settings leave out may be among them."""

    head_settings: tuple[str, ...]
    """The settings that concern them alone, which each base may have its own of."""


def check_headed(decoder: nn.Module, decoder_type: str, settings: Mapping[str, Any]) -> None:
    """Make sure that a decoder can have heads for several bases, and that a base's own settings are of its head.

    Args:
        decoder: The decoder.
        decoder_type: What the configuration calls it.
        settings: What a base sets for itself.

    Raises:
        GeneratorConfigError: If not.
    """
    if not isinstance(decoder, HeadedDecoder):
        raise GeneratorConfigError(
            f"The decoder {decoder_type!r} has no part that could be one base's alone, so a generator with it has one "
            "base. Use decoder_type='set_transformer', or fit a generator for each base."
        )
    others = sorted(set(settings) - set(decoder.head_settings))
    if others:
        raise GeneratorConfigError(
            f"{others[0]!r} is a setting of the trunk, or of no part, of the decoder {decoder_type!r}: all bases "
            f"share it. A base's own may be {', '.join(map(repr, decoder.head_settings))}."
        )


def head_of(decoder: Any) -> dict[str, nn.Module]:
    """The submodules of a decoder that belong to the base, by their names."""
    return {name: decoder._modules[name] for name in decoder.head_modules if name in decoder._modules}


def share_trunk(decoder: Any, trunk_of: Any) -> None:
    """Have a decoder use another's trunk in place of its own: the very modules, parameters and buffers.

    Args:
        decoder: The decoder, of the same family and with the same settings but for those of the head. Its head stays.
        trunk_of: The other.

    Raises:
        GeneratorConfigError: If the trunks differ in form.
    """
    mine, theirs = (_trunk_shapes(one) for one in (decoder, trunk_of))
    if mine != theirs:
        name = next(name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name))
        raise GeneratorConfigError(
            f"The decoder of a further base has {name!r} of shape {mine.get(name)} in its trunk, and that of the "
            f"first base {theirs.get(name)}, so they cannot share it."
        )
    decoder._parameters, decoder._buffers = trunk_of._parameters, trunk_of._buffers
    for name, module in trunk_of._modules.items():
        if name not in trunk_of.head_modules:
            decoder._modules[name] = module


def _trunk_shapes(decoder: Any) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for name, tensor in decoder.state_dict().items()
        if name.partition(".")[0] not in decoder.head_modules
    }
