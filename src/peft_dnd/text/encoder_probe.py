# SPDX-License-Identifier: Apache-2.0
"""`EncoderProbe`: what a text encoder gives for two sentences of ours, small enough to be kept beside what it read.

Names and revisions do not tell whether an encoder is the one that texts were read by, since a local folder keeps its
name when its weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .encoder import TextEncoder
from .token_states import TokenStates


PROBE = ("The quick brown fox jumps over the lazy dog.", "Name the capital of {country} (one word): ¿?")
"""What an encoder reads to be known again."""

_NUMBERS = 48
# Other numbers of threads and other processors add in another order; another encoder lies at another place altogether.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class EncoderProbe:
    """By what a text encoder is known again.

    Attributes:
        dtype: In what its weights are, such as `"float32"`.
        shape: Of the states of [`PROBE`][peft_dnd.text.encoder_probe.PROBE]: how many tokens, how wide.
        numbers: Some of them, evenly from among all.
    """

    dtype: str
    shape: tuple[int, ...]
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        # As JSON gives them.
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        object.__setattr__(self, "numbers", tuple(map(float, self.numbers)))

    @classmethod
    def of(cls, encoder: TextEncoder, read: Callable[[TextEncoder, Sequence[str]], TokenStates]) -> EncoderProbe:
        """That of a loaded text encoder, as it is read."""
        module = encoder.module
        training = module.training
        module.eval()  # one that is being fitted has dropout
        try:
            with torch.no_grad():
                states = read(encoder, PROBE).flat.float().cpu()
        finally:
            module.train(training)
        flat = states.flatten()
        some = flat[torch.linspace(0, len(flat) - 1, min(_NUMBERS, len(flat))).long()]
        weights = next(module.parameters(), None)
        dtype = "none" if weights is None else str(weights.dtype).removeprefix("torch.")
        return cls(dtype, tuple(states.shape), tuple(float(f"{value:.4g}") for value in some.tolist()))

    def difference(self, other: EncoderProbe) -> str | None:
        """What another one differs in, in words; `None` if it is the same encoder, read in the same way."""
        if self.dtype != other.dtype:
            return f"it was one in {self.dtype}, and this one is in {other.dtype}"
        if self.shape != other.shape:
            return f"its states had the shape {self.shape}, and those of this one have {other.shape}"
        mine, found = torch.tensor(self.numbers), torch.tensor(other.numbers)
        off = float((mine - found).norm() / mine.norm().clamp_min(torch.finfo(torch.float32).tiny))
        return None if off <= _TOLERANCE else f"of two sentences it gave states that differ by {off:.0%}"
