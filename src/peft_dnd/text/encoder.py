# SPDX-License-Identifier: Apache-2.0
"""Text encoders: what the library asks of one (`TextEncoder`), and a cache of what they give."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import GeneratorConfigError, TextEncoderError
from .prompts import TokenStates, check_prompts, prompts_digest


logger = logging.getLogger(__name__)
_PROMPTS_LOOKED_AT = 64
_LENGTH_STEP = 8


class TextEncoder(Protocol):
    """What the library asks of a text encoder.

    The library brings `SentenceTransformerTextEncoder` and `HiddenStatesTextEncoder`. Whoever writes another keeps
    this promise: while it is frozen, the same prompts give the same bytes, whatever was encoded before.

    An encoder that reads a chosen layer, several, or long prompts in windows, tells so by attributes `layer`, `layers`
    (a tuple) and `window_tokens`; one that has none of them does none of it. In windows it is called as
    `encode_tokens(prompts, max_length=...)`, and need not read a prompt further than that.

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
        "peft_dnd.text.sentence_transformer.SentenceTransformerTextEncoder.from_pretrained(name)."
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


class PromptEmbeddingCache:
    """Encodes each distinct pool of prompts once and keeps the result in RAM, on the CPU.

    Pools are told apart by [`prompts_digest`], so two tasks with the same prompts share an entry, and a task whose
    prompts change gets a new one. For the size of it: a token of all-MiniLM-L6-v2 takes 1.5 kB in `float32`.

    Args:
        encoder: The text encoder.
        read: What [`PromptEmbeddingCache.states`] keeps of a pool; default: the encoder's token states.
        dtype: How embeddings are stored. `torch.float16` or `torch.bfloat16` halve the memory at 3 or 2 significant
            digits; [`TokenStates.select`] gives `float32` in any case.

    Attributes:
        encoder_calls: How often the encoder was called so far.

    Raises:
        GeneratorConfigError: If `dtype` is no floating point type.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        read: Callable[[TextEncoder, Sequence[str]], TokenStates] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not dtype.is_floating_point:
            raise GeneratorConfigError(f"Embeddings are stored in a floating point dtype, not in {dtype}.")
        self.encoder = encoder
        self.dtype = dtype
        self.encoder_calls = 0
        self._read = _read_tokens if read is None else read
        self._states: dict[str, TokenStates] = {}
        self._sentences: dict[str, Tensor] = {}

    def states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        """The token states of a task's prompts.

        Args:
            task: The task's name, for messages.
            prompts: Its whole pool of prompts.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
            TextEncoderError: If the encoder gives no token states, or they do not fit into the cache's dtype.
            GeneratorConfigError: If the encoder is trainable: what it gives changes at every step.
        """
        checked = check_prompts(prompts, what=f"the prompts of task {task!r}")
        digest = prompts_digest(checked)
        if digest not in self._states:
            self._count_call()
            states = self._read(self.encoder, checked)
            self._states[digest] = TokenStates(self._stored(task, states.flat), states.offsets.cpu())
        return self._states[digest]

    def sentences(self, task: str, prompts: Sequence[str]) -> Tensor:
        """The sentence embeddings of a task's prompts, in the cache's dtype, `(n, sentence_embedding_size)`.

        Arguments and errors are those of [`PromptEmbeddingCache.states`].
        """
        checked = check_prompts(prompts, what=f"the prompts of task {task!r}")
        digest = prompts_digest(checked)
        if digest not in self._sentences:
            self._count_call()
            self._sentences[digest] = self._stored(task, self.encoder.encode_sentences(checked))
        return self._sentences[digest]

    @property
    def nbytes(self) -> int:
        """Memory that all entries take, in bytes."""
        states = sum(states.nbytes for states in self._states.values())
        return states + sum(sentences.nbytes for sentences in self._sentences.values())

    def __len__(self) -> int:
        return len(self._states) + len(self._sentences)

    def clear(self) -> None:
        """Forget every entry."""
        self._states.clear()
        self._sentences.clear()

    def _count_call(self) -> None:
        if self.encoder.trainable:
            raise GeneratorConfigError(
                "The embeddings of a trainable text encoder cannot be cached, since they change at every step. "
                "Freeze it (encoder.trainable = False), or call the encoder itself."
            )
        self.encoder_calls += 1

    def _stored(self, task: str, embeddings: Tensor) -> Tensor:
        logger.debug("Encoded the prompts of task %r: %d rows.", task, len(embeddings))
        stored = embeddings.detach().to(device="cpu", dtype=self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise TextEncoderError(
                f"The embeddings of task {task!r} are not all finite as {self.dtype}; their largest absolute value "
                f"is {float(embeddings.abs().max()):.3g}. Store them in torch.float32 or torch.bfloat16."
            )
        return stored


def _read_tokens(encoder: TextEncoder, prompts: Sequence[str]) -> TokenStates:
    return encoder.encode_tokens(prompts)
