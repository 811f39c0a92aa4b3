# SPDX-License-Identifier: Apache-2.0
"""`PromptEmbeddingCache`: what a frozen text encoder gives for each pool of prompts, kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import GeneratorConfigError, TextEncoderError
from .encoder import TextEncoder
from .prompts import check_prompts, prompts_digest
from .token_states import TokenStates


logger = logging.getLogger(__name__)


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
