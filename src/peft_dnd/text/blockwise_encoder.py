# SPDX-License-Identifier: Apache-2.0
"""What the library's own text encoders share: prompts in blocks without padding, long ones in windows."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..errors import GeneratorConfigError, PromptError, TextEncoderError
from .prompts import check_prompts
from .token_states import TokenStates


logger = logging.getLogger(__name__)

# As a length: more tokens than any text has, but still a number that tokenizers take.
UNLIMITED = 2**31
_TRAINING_BLOCK_TOKENS = 1024
_PROGRESS_BAR_FROM = 512  # prompts; short ones take all-MiniLM-L6-v2 some 14 ms each on one CPU core


class BlockwiseTextEncoder(ABC):
    """Reads prompts in blocks of equal token length, so that none is padded, and says which were too long.

    Args:
        window_tokens: The most tokens that go through the model at once; `None`: longer prompts are cut instead.
        block_tokens: How many tokens of prompts of equal length may go through the frozen model at once, at least one
            prompt's.

    Raises:
        GeneratorConfigError: If `block_tokens` is impossible.
    """

    trainable: bool

    def __init__(self, *, window_tokens: int | None, block_tokens: int) -> None:
        if block_tokens < 1:
            raise GeneratorConfigError(f"block_tokens must be at least 1, not {block_tokens}.")
        self.window_tokens = window_tokens
        self.block_tokens = block_tokens
        self._has_warned = False

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """The most tokens of one prompt, special tokens included; `None` if there is no limit."""

    @abstractmethod
    def _token_lengths(self, prompts: Sequence[str]) -> Sequence[int | None]:
        """How many tokens are read of each prompt; `None` where that is unknown."""

    @abstractmethod
    def _whole_lengths(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt would have if none were cut."""

    @abstractmethod
    def _token_states(self, prompts: list[str], max_length: int | None) -> list[Tensor]:
        """The states of the first tokens of prompts of equal length, `float32`, `(tokens, C)` each."""

    def encode_tokens(self, prompts: Sequence[str], *, max_length: int | None = None) -> TokenStates:
        """The states of all tokens of each prompt that are not padding, special tokens included.

        Args:
            prompts: The prompts.
            max_length: The most states of one prompt. The others are left out, and windows in which there is nothing
                else are not read; what is left is the same as without.

        Returns:
            Token states, `float32`, on the device of the model.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`], or if the tokenizer makes no token of a prompt.
            TextEncoderError: If the model has no token states (a bag of words), they are not finite, or an adapter is
                merged into the model.
        """
        return TokenStates.from_list(self._encode(prompts, lambda texts: self._token_states(texts, max_length)))

    def _encode(self, prompts: Sequence[str], encode: Callable[[list[str]], list[Tensor]]) -> list[Tensor]:
        """One tensor for each prompt, in their order, of a function that encodes those of one block."""
        checked = check_prompts(prompts)
        lengths = self._token_lengths(checked)
        if 0 in lengths:
            number = lengths.index(0)
            raise PromptError(
                f"prompts[{number}] ({checked[number]!a:.60}) has no token in the vocabulary of the text encoder. "
                "Leave it out, or use an encoder that knows its script."
            )
        self._warn_of_cuts(checked, lengths)
        block_tokens = _TRAINING_BLOCK_TOKENS if self.trainable else self.block_tokens
        outputs: dict[int, Tensor] = {}
        with transformers_logging.tqdm(
            total=len(checked), desc="Encoding prompts", unit="prompt", disable=len(checked) < _PROGRESS_BAR_FROM
        ) as progress:
            for block in _equal_length_blocks(lengths, block_tokens):
                outputs.update(zip(block, encode([checked[index] for index in block]), strict=True))
                progress.update(len(block))
        ordered = [outputs[index] for index in range(len(checked))]
        _check_finite(ordered, checked)
        return ordered

    def _warn_of_cuts(self, prompts: Sequence[str], lengths: Sequence[int | None]) -> None:
        """Say how many prompts were cut: once as a warning, and then quietly, as a server sees the same ones again."""
        limit = self.max_length
        if limit is None:
            return
        # Most prompts are shorter; only those that fill the limit must be asked whether they would exceed it.
        full = [text for text, length in zip(prompts, lengths, strict=True) if length is not None and length >= limit]
        num_cut = sum(length > limit for length in self._whole_lengths(full)) if full else 0
        if num_cut:
            logger.log(
                logging.INFO if self._has_warned else logging.WARNING,
                "%d of %d prompts are longer than the text encoder's limit of %d tokens and were cut there.",
                num_cut,
                len(prompts),
                limit,
            )
            self._has_warned = True


def windows(length: int, window_tokens: int | None, read: int | None = None) -> list[slice]:
    """Where a text of so many tokens is cut: windows of `window_tokens` each, the last one with what is left.

    Windows of which nothing is among the first `read` tokens are left out.

    >>> windows(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    >>> windows(5, 2, read=3)
    [slice(0, 2, None), slice(2, 4, None)]
    >>> windows(5, None)
    [slice(0, 5, None)]
    """
    step = length if window_tokens is None else window_tokens
    end = length if read is None else min(read, length)
    return [slice(start, min(start + step, length)) for start in range(0, end, max(1, step))]


def check_token_limits(max_length: int | None, window_tokens: int | None, least: int, most: int | None) -> None:
    """Check how many tokens a text may have, and how many of them go through a model at once.

    Args:
        max_length: The most tokens of a text; `None` for no limit of its own.
        window_tokens: The most tokens of a window; `None` if longer texts are cut.
        least: The fewest that make sense: the special tokens and one more.
        most: The most that the model can read at once; `None` if that has no bound.

    Raises:
        GeneratorConfigError: If one of them is out of range.
    """
    # Windows lift the bound of the position embeddings from the whole text.
    bound_of_text = most if window_tokens is None else None
    for name, number, bound in (("max_length", max_length, bound_of_text), ("window_tokens", window_tokens, most)):
        if number is not None and (
            not isinstance(number, int) or number < least or (bound is not None and number > bound)
        ):
            raise GeneratorConfigError(
                f"{name} of the text encoder must be from {least} (its special tokens and one more) to "
                f"{bound or 'any number'} (its position embeddings), not {number!r}."
            )


def _equal_length_blocks(lengths: Sequence[int | None], block_tokens: int) -> Iterator[list[int]]:
    """Group prompts of equal length into blocks of at most `block_tokens` tokens.

    Yields indices of prompts. A prompt longer than a block, or of unknown length, is a block of its own.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length is None:
            yield [index]
        else:
            groups.setdefault(length, []).append(index)
    for length, group in groups.items():
        size = max(1, block_tokens // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _check_finite(embeddings: list[Tensor], prompts: Sequence[str]) -> None:
    if bool(torch.isfinite(torch.stack([embedding.detach().sum() for embedding in embeddings])).all()):
        return
    bad = next(index for index, embedding in enumerate(embeddings) if not bool(torch.isfinite(embedding).all()))
    raise TextEncoderError(
        f"The text encoder's embedding of prompts[{bad}] ({prompts[bad]!a:.60}) is not finite. Load the encoder in "
        "torch.float32 (dtype=torch.float32); if that does not help, its weights are damaged."
    )
