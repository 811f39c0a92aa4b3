# SPDX-License-Identifier: Apache-2.0
"""What text encoders have in common: reading prompts in blocks without padding, and long ones in windows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..errors import GeneratorConfigError, PromptError, TextEncoderError


logger = logging.getLogger(__name__)

_PROGRESS_BAR_FROM = 512  # prompts; short ones take all-MiniLM-L6-v2 some 14 ms each on one CPU core


def encode_in_blocks(
    prompts: Sequence[str],
    lengths: Sequence[int | None],
    block_tokens: int,
    encode: Callable[[list[str]], list[Tensor]],
) -> list[Tensor]:
    """Encode prompts in blocks of equal token length, so that none is padded.

    Args:
        prompts: The prompts.
        lengths: How many tokens each has; `None` where that is unknown.
        block_tokens: How many tokens a block may have, at least one prompt's.
        encode: Encodes the prompts of one block, one tensor each.

    Returns:
        One tensor for each prompt, in their order.

    Raises:
        PromptError: If a prompt has no token.
        TextEncoderError: If a tensor is not finite.
    """
    if 0 in lengths:
        number = lengths.index(0)
        raise PromptError(
            f"prompts[{number}] ({prompts[number]!a:.60}) has no token in the vocabulary of the text encoder. "
            "Leave it out, or use an encoder that knows its script."
        )
    outputs: dict[int, Tensor] = {}
    with transformers_logging.tqdm(
        total=len(prompts), desc="Encoding prompts", unit="prompt", disable=len(prompts) < _PROGRESS_BAR_FROM
    ) as progress:
        for block in equal_length_blocks(lengths, block_tokens):
            outputs.update(zip(block, encode([prompts[index] for index in block]), strict=True))
            progress.update(len(block))
    ordered = [outputs[index] for index in range(len(prompts))]
    _check_finite(ordered, prompts)
    return ordered


def equal_length_blocks(lengths: Sequence[int | None], block_tokens: int) -> Iterator[list[int]]:
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
    named = {"max_length": max_length, "window_tokens": window_tokens}
    for name, number in named.items():
        # Windows lift the bound of the position embeddings from the whole text.
        bound = None if name == "max_length" and window_tokens is not None else most
        if number is not None and (
            not isinstance(number, int) or number < least or (bound is not None and number > bound)
        ):
            raise GeneratorConfigError(
                f"{name} of the text encoder must be from {least} (its special tokens and one more) to "
                f"{bound or 'any number'} (its position embeddings), not {number!r}."
            )


class CutWarning:
    """Says how many prompts were cut: once as a warning, and then quietly.

    A served generator sees the same prompts again and again.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def __call__(self, num_cut: int, num_prompts: int, limit: int) -> None:
        """Report, if there is something to report."""
        if not num_cut:
            return
        logger.log(
            logging.INFO if self._has_warned else logging.WARNING,
            "%d of %d prompts are longer than the text encoder's limit of %d tokens and were cut there.",
            num_cut,
            num_prompts,
            limit,
        )
        self._has_warned = True


def _check_finite(embeddings: list[Tensor], prompts: Sequence[str]) -> None:
    if bool(torch.isfinite(torch.stack([embedding.detach().sum() for embedding in embeddings])).all()):
        return
    bad = next(index for index, embedding in enumerate(embeddings) if not bool(torch.isfinite(embedding).all()))
    raise TextEncoderError(
        f"The text encoder's embedding of prompts[{bad}] ({prompts[bad]!a:.60}) is not finite. Load the encoder in "
        "torch.float32 (dtype=torch.float32); if that does not help, its weights are damaged."
    )
