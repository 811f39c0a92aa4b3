# SPDX-License-Identifier: Apache-2.0
"""Decoders: one file a family, torch only. Condition states in, weight tokens out.

A decoder is any `torch.nn.Module` built as `(condition_shape, token_shape, **settings)` with keyword-only settings,
whose `forward(states, mask)` takes (B, N, L, C) and (B, N, L) to (B, N_w, L_w, C_w). One whose third parameter is
called `positions` is told where each token belongs. Entering its class in `DECODERS` makes it a `decoder_type` of the
generator's config.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..adapters.positions import TokenPositions
from ..errors import GeneratorConfigError
from .cascade import derive_cascade
from .core import CoreDecoder
from .heads import HeadedDecoder, check_headed, head_of, share_trunk
from .hyper_convolution import HyperConvolutionDecoder, HyperConvolutionLayer
from .set_transformer import SetTransformerDecoder
from .text_to_lora import TextToLoraDecoder


__all__ = [
    "DECODERS",
    "CenteredDecoder",
    "CoreDecoder",
    "Decoder",
    "HeadedDecoder",
    "HyperConvolutionDecoder",
    "HyperConvolutionLayer",
    "PartialDecoder",
    "SetTransformerDecoder",
    "TextToLoraDecoder",
    "TokenPositions",
    "build_decoder",
    "check_decoder_type",
    "check_headed",
    "derive_cascade",
    "head_of",
    "share_trunk",
]


class Decoder(Protocol):
    """What a generator asks of its decoder, which is a `torch.nn.Module` besides."""

    reads_sets: bool
    """Whether it takes any number of prompts of any length, rather than the N and L that it was built for."""

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that build this very decoder, whatever rule a later version fills gaps by."""

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Condition states (B, N, L, C) and their mask (B, N, L) to normalised tokens (B, N_w, L_w, C_w)."""


@runtime_checkable
class PartialDecoder(Protocol):
    """A decoder that writes some matrices the same whatever the prompts, which saves time in fitting on task loss."""

    written_sides: tuple[str, ...]
    """Which sides of the matrices, `"A"` or `"B"`, the prompts have a say in."""


@runtime_checkable
class CenteredDecoder(Protocol):
    """A decoder that first takes from the training tasks what their prompts have in common."""

    centered: torch.Tensor
    """Whether it has."""

    def center_on(self, states_of_tasks: Iterable[torch.Tensor]) -> None:
        """Takes for each task the states of all tokens of its prompts, (any number, C)."""


DECODERS: dict[str, type[nn.Module]] = {
    "core": CoreDecoder,
    "hyper_convolution": HyperConvolutionDecoder,
    "set_transformer": SetTransformerDecoder,
    "text_to_lora": TextToLoraDecoder,
}


def check_decoder_type(decoder_type: object) -> None:
    """Makes sure that there is a decoder of a type.

    Raises:
        GeneratorConfigError: there is none.
    """
    if not isinstance(decoder_type, str) or decoder_type not in DECODERS:
        raise GeneratorConfigError(
            f"Unknown decoder_type {decoder_type!r}. Known: {', '.join(map(repr, sorted(DECODERS)))}. If a newer "
            "version of peft_dnd wrote the generator, upgrade: pip install --upgrade peft-dnd. A decoder of your own "
            "has to be entered in peft_dnd.decoders.DECODERS first."
        )


def build_decoder(
    decoder_type: str,
    condition_shape: tuple[int, int, int],
    token_shape: tuple[int, int, int],
    settings: Mapping[str, Any],
    positions: TokenPositions | None = None,
) -> nn.Module:
    """Builds the decoder that a generator's config names.

    Args:
        decoder_type: a key of `DECODERS`.
        condition_shape: (N, L, C) of the condition states.
        token_shape: (N_w, L_w, C_w) of the weight tokens.
        settings: keyword arguments of that decoder's class; absent ones take its defaults.
        positions: where each weight token belongs, for a decoder that asks for it.

    Raises:
        GeneratorConfigError: the type or a setting is unknown, or the decoder refuses a value.
    """
    check_decoder_type(decoder_type)
    decoder_class = DECODERS[decoder_type]
    parameters = inspect.signature(decoder_class).parameters
    known = [parameter.name for parameter in parameters.values() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise GeneratorConfigError(
            f"The decoder {decoder_type!r} has no setting {', '.join(map(repr, unknown))}. "
            f"Its settings: {', '.join(map(repr, known))}."
        )
    places = {"positions": positions} if "positions" in parameters else {}
    return decoder_class(condition_shape, token_shape, **places, **settings)
