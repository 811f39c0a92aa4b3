# SPDX-License-Identifier: Apache-2.0
"""`TextEncoder`: what the library asks of a text encoder, and the questions that it puts to a loaded one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..errors import GeneratorConfigError, TextEncoderError
from .token_states import TokenStates


_PROMPTS_LOOKED_AT = 64
_LENGTH_STEP = 8


class TextEncoder(Protocol):
    """What the library asks of a text encoder.

    The library brings `SentenceTransformerTextEncoder` and `HiddenStatesTextEncoder`. Whoever writes another keeps
    this promise: while it is frozen, the same prompts give the same bytes, whatever was encoded before.

    An encoder that reads a chosen layer, several, or long prompts in windows, tells so by attributes `layer`, `layers`
    (a tuple) and `window_tokens`; one that has none of them does none of it. In windows it is called as
    `encode_tokens(prompts, max_length=...)`, and need not read a prompt further than that. One that knows its commit
    on the Hub tells it by `commit_hash`.

    Attributes:
        trainable: Whether gradients flow into the encoder; the library sets it when the encoder is to be fitted too.
    """

    trainable: bool

    @property
    def name_or_path(self) -> str | None:
        """Hub id or folder; `None` if it has neither."""

    @property
    def module(self) -> nn.Module:
        """The network, for its parameters and its train or eval mode."""

    @property
    def embedding_size(self) -> int:
        """C, the size of one token state."""

    @property
    def sentence_embedding_size(self) -> int:
        """The size of one sentence embedding."""

    @property
    def max_length(self) -> int | None:
        """The most tokens that one prompt can have, longer ones being cut; `None` if there is no limit."""

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many token states each prompt will have."""

    def encode_tokens(self, prompts: Sequence[str]) -> TokenStates:
        """The states of all tokens of each prompt that are not padding, special tokens included."""

    def encode_sentences(self, prompts: Sequence[str]) -> Tensor:
        """One embedding for each prompt, `float32` `(n, sentence_embedding_size)`."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the encoder into a folder of its own."""


def check_text_encoder(encoder: object, *, or_none: bool = False) -> None:
    """Make sure that a loaded text encoder is one, and not, for instance, the name of one.

    Raises:
        TextEncoderError: If it is none.
    """
    if (encoder is None and or_none) or hasattr(encoder, "encode_tokens"):
        return
    raise TextEncoderError(
        f"A loaded text encoder is expected, got {encoder!r}. Load one by its folder or Hub id: "
        "peft_dnd.text.SentenceTransformerTextEncoder.from_pretrained(name)."
    )


def condition_size(encoder: TextEncoder, condition: str) -> int:
    """The width of what a text encoder gives in the form of a condition, one of `configuration.CONDITIONS`."""
    return encoder.sentence_embedding_size if condition == "sentence_embeddings" else encoder.embedding_size


def check_how_it_reads(
    encoder: TextEncoder, layer: int | None, window_tokens: int | None, layers: Sequence[int] | None = None
) -> None:
    """Check that a loaded text encoder reads the layer or layers, and in the windows, that are asked for.

    Raises:
        GeneratorConfigError: If it does not.
    """
    asked = {"layer": layer, "layers": None if layers is None else tuple(layers), "window_tokens": window_tokens}
    for name, wanted in asked.items():
        found = getattr(encoder, name, None)
        if wanted is not None and wanted != found:
            raise GeneratorConfigError(
                f"{name}={wanted} is asked for, and the loaded text encoder has {name}={found}. Load it with "
                f"{'AnswerStates' if name == 'layers' else 'SentenceTransformer'}TextEncoder.from_pretrained(..., "
                f"{name}={wanted}), or ask for what it has."
            )


def longest_prompt(encoder: TextEncoder, pools: Iterable[Sequence[str]]) -> int:
    """How many tokens the longest of up to 64 prompts of each pool has, rounded up to a multiple of 8."""
    longest = 1
    for prompts in pools:
        longest = max(longest, *encoder.count_tokens(prompts[:_PROMPTS_LOOKED_AT]))
    return math.ceil(longest / _LENGTH_STEP) * _LENGTH_STEP
