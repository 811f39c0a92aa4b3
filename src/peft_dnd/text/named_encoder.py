# SPDX-License-Identifier: Apache-2.0
"""Loading the text encoder that a configuration names, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Sequence

from .answer_states_encoder import AnswerStatesTextEncoder
from .encoder import TextEncoder
from .sentence_transformer_encoder import SentenceTransformerTextEncoder


def load_named_encoder(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    window_tokens: int | None = None,
) -> TextEncoder:
    """Load a text encoder by the Hub id or folder of its model: with `layers` as one of answer states.

    Raises:
        TextEncoderError: If it cannot be loaded.
    """
    if layers is not None:
        return AnswerStatesTextEncoder.from_pretrained(name, layers, revision=revision, token=token)
    return SentenceTransformerTextEncoder.from_pretrained(
        name, revision=revision, token=token, layer=layer, window_tokens=window_tokens
    )
