# SPDX-License-Identifier: Apache-2.0
"""`PromptEmbeddingCache`: what a frozen text encoder gives for each pool of prompts, kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from ..errors import GeneratorConfigError, TextEncoderError
from .encoder import TextEncoder
from .prompts import check_prompts, prompts_digest
from .token_states import TokenStates


logger = logging.getLogger(__name__)


class PromptEmbeddingCache:
    """Encodes each distinct pool of prompts once and keeps the result in RAM, on the CPU.

    Pools are told apart by [`prompts_digest`], so two tasks with the same prompts share an entry, and a task whose
    prompts change gets a new one. For the size of it: a token of all-MiniLM-L6-v2 takes 1.5 kB.

    Args:
        encoder: The text encoder.
        read: What is kept of a pool; default: the encoder's token states.

    Attributes:
        encoder_calls: How often the encoder was called so far.
    """

    def __init__(
        self, encoder: TextEncoder, *, read: Callable[[TextEncoder, Sequence[str]], TokenStates] | None = None
    ) -> None:
        self.encoder = encoder
        self.encoder_calls = 0
        self._read = read
        self._states: dict[str, TokenStates] = {}

    def states(self, task: str, prompts: Sequence[str]) -> TokenStates:
        """The token states of a task's prompts.

        Args:
            task: The task's name, for messages.
            prompts: Its whole pool of prompts.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
            TextEncoderError: If the encoder gives no token states, or they are not finite.
            GeneratorConfigError: If the encoder is trainable: what it gives changes at every step.
        """
        checked = check_prompts(prompts, what=f"the prompts of task {task!r}")
        digest = prompts_digest(checked)
        if digest not in self._states:
            self._states[digest] = self._encoded(task, checked)
        return self._states[digest]

    def _encoded(self, task: str, prompts: Sequence[str]) -> TokenStates:
        if self.encoder.trainable:
            raise GeneratorConfigError(
                "The embeddings of a trainable text encoder cannot be cached, since they change at every step. "
                "Freeze it (encoder.trainable = False), or call the encoder itself."
            )
        self.encoder_calls += 1
        states = self.encoder.encode_tokens(prompts) if self._read is None else self._read(self.encoder, prompts)
        logger.debug("Encoded the prompts of task %r: %d rows.", task, len(states.flat))
        kept = states.flat.detach().float().cpu()
        if not bool(torch.isfinite(kept).all()):
            raise TextEncoderError(
                f"The embeddings of task {task!r} are not all finite. Load the encoder in torch.float32; if that does "
                "not help, its weights are damaged."
            )
        return TokenStates(kept, states.offsets.cpu())
