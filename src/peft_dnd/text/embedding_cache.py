# SPDX-License-Identifier: Apache-2.0
"""`PromptEmbeddingCache`: what a frozen text encoder gives for each pool of prompts, kept in memory and on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from ..errors import GeneratorConfigError, TextEncoderError
from ..storage.files import PathLike
from .encoder import TextEncoder
from .encoder_probe import EncoderProbe
from .prompts import check_prompts, prompts_digest
from .stored_states import StoredTokenStates
from .token_states import TokenStates


logger = logging.getLogger(__name__)


class PromptEmbeddingCache:
    """Encodes each distinct pool of prompts once and keeps the result in RAM, on the CPU.

    Pools are told apart by [`prompts_digest`], so two tasks with the same prompts share an entry, and a task whose
    prompts change gets a new one. For the size of it: a token of all-MiniLM-L6-v2 takes 1.5 kB.

    Args:
        text_encoder: The text encoder.
        read: What is kept of a pool; default: the encoder's token states.
        folder: Where it is kept on disk as well, so that another run need not read the same prompts; by default
            nowhere. The folder is looked at when the first states are asked for.

    Attributes:
        encoder_calls: How often the encoder was called so far.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        *,
        read: Callable[[TextEncoder, Sequence[str]], TokenStates] | None = None,
        folder: PathLike | None = None,
    ) -> None:
        self.encoder = text_encoder
        self.encoder_calls = 0
        self._read = read or _token_states
        self._folder = folder
        self._states: dict[str, TokenStates] = {}

    @cached_property
    def _stored(self) -> StoredTokenStates | None:
        if self._folder is None:
            return None
        return StoredTokenStates(self._folder, EncoderProbe.of(self.encoder, self._read))

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
            SavingError: If what it gives cannot be written to the folder.
        """
        checked = check_prompts(prompts, what=f"the prompts of task {task!r}")
        digest = prompts_digest(checked)
        if digest not in self._states:
            self._check_frozen()
            states = None if self._stored is None else self._stored.get(digest)
            if states is None:
                states = self._encoded(task, checked)
                if self._stored is not None:
                    self._stored.put(digest, states)
            self._states[digest] = states
        return self._states[digest]

    def _check_frozen(self) -> None:
        if self.encoder.trainable:
            raise GeneratorConfigError(
                "The embeddings of a trainable text encoder cannot be cached, since they change at every step. "
                "Freeze it (encoder.trainable = False), or call the encoder itself."
            )

    def _encoded(self, task: str, prompts: Sequence[str]) -> TokenStates:
        self.encoder_calls += 1
        states = self._read(self.encoder, prompts)
        logger.debug("Encoded the prompts of task %r: %d rows.", task, len(states.flat))
        kept = states.flat.detach().float().cpu()
        if not bool(torch.isfinite(kept).all()):
            raise TextEncoderError(
                f"The embeddings of task {task!r} are not all finite. Load the encoder in torch.float32; if that does "
                "not help, its weights are damaged."
            )
        return TokenStates(kept, states.offsets.cpu())


def _token_states(encoder: TextEncoder, prompts: Sequence[str]) -> TokenStates:
    return encoder.encode_tokens(prompts)
