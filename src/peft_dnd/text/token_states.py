# SPDX-License-Identifier: Apache-2.0
"""`TokenStates`: what a text encoder makes of a pool of prompts, and the padded stack that a decoder reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GeneratorConfigError, TextEncoderError


@dataclass(frozen=True, eq=False)
class TokenStates:
    """The states of every token of a pool of n prompts, stored without padding.

    Prompt i has the rows `flat[offsets[i]:offsets[i + 1]]`.

    Attributes:
        flat: Floating point, `(total_tokens, C)`; `float32` from the library's own encoders.
        offsets: `int64`, `(n + 1,)`, from 0 to `total_tokens`, never falling.
    """

    flat: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if self.flat.dim() != 2 or not self.flat.is_floating_point():
            raise TextEncoderError(
                "Token states must be floating point of shape (total_tokens, C), not "
                f"{self.flat.dtype} of shape {tuple(self.flat.shape)}."
            )
        offsets = self.offsets
        if offsets.dim() != 1 or offsets.dtype != torch.int64 or len(offsets) < 2:
            raise TextEncoderError(
                f"Offsets of token states must be int64 of shape (n + 1,), not {offsets.dtype} of shape "
                f"{tuple(offsets.shape)}."
            )
        if offsets[0] != 0 or offsets[-1] != len(self.flat) or bool((offsets.diff() < 0).any()):
            raise TextEncoderError(
                f"Offsets of token states must rise from 0 to {len(self.flat)}, the number of tokens; "
                f"they go from {int(offsets[0])} to {int(offsets[-1])}."
            )

    @classmethod
    def from_list(cls, states: Sequence[Tensor]) -> TokenStates:
        """Join the states of single prompts, each `(its tokens, C)`; gradients flow through."""
        lengths = torch.tensor([0, *(len(state) for state in states)], device=states[0].device)
        return cls(torch.cat(list(states)), lengths.cumsum(0))

    @classmethod
    def from_vectors(cls, vectors: Tensor) -> TokenStates:
        """One state a prompt, `(n, C)`: sentence embeddings in the shape that token states have."""
        return cls(vectors, torch.arange(len(vectors) + 1, device=vectors.device))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """The states of one prompt, `(its tokens, C)`: a view."""
        index = range(len(self))[index]
        return self.flat[int(self.offsets[index]) : int(self.offsets[index + 1])]

    @property
    def embedding_size(self) -> int:
        """C, the size of one token state."""
        return self.flat.shape[1]

    @property
    def lengths(self) -> Tensor:
        """How many tokens each prompt has, `int64` `(n,)`."""
        return self.offsets.diff()

    def cut(self, max_length: int) -> TokenStates:
        """The states of the first `max_length` tokens of each prompt: all that a decoder reads need not be kept."""
        lengths = self.lengths
        if not bool((lengths > max_length).any()):
            return self
        starts = self.offsets[:-1].repeat_interleave(lengths)
        positions = torch.arange(len(self.flat), device=self.flat.device) - starts
        kept = torch.cat([self.offsets[:1], lengths.clamp(max=max_length).cumsum(0)])
        return TokenStates(self.flat[positions < max_length], kept)

    def select(self, indices: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Stack the states of some prompts, zero-padded to one length.

        Args:
            indices: Which prompts, in which order, `int64` `(N,)`; repeats are allowed (see `select_prompts`).
            max_length: L. Of a longer prompt the first L tokens are kept; where all are shorter it is L all the same.

        Returns:
            `states`, `float32` `(N, L, C)`, zero where there is no token; and `mask`, `bool` `(N, L)`, true where
            there is one. Both on the device of the stored states.

        Raises:
            IndexError: If an index is out of range.
            GeneratorConfigError: If `max_length` is less than 1.
        """
        if max_length < 1:
            raise GeneratorConfigError(f"max_length must be at least 1, not {max_length}.")
        indices = indices.to(self.offsets.device)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"Prompt indices must be from 0 to {len(self) - 1}, not {int(indices.min())} to {int(indices.max())}."
            )
        positions = torch.arange(max_length, device=indices.device)
        mask = positions < self.lengths[indices, None]
        rows = (self.offsets[indices, None] + positions)[mask]
        states = torch.zeros(*mask.shape, self.embedding_size, dtype=torch.float32, device=self.flat.device)
        states[mask] = self.flat[rows].float()
        return states, mask

    def mean(self) -> Tensor:
        """The mean of each prompt's token states, `float32` `(n, C)`.

        This is masked mean pooling and nothing else; a text encoder's own sentence embeddings
        (`TextEncoder.encode_sentences`) may be pooled otherwise, projected or normalised.
        """
        return torch.segment_reduce(self.flat.float(), "mean", lengths=self.lengths, unsafe=True)
