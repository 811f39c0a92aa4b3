# SPDX-License-Identifier: Apache-2.0
"""Adapters in eight bits a number, as a generator sees them: normalised tokens, each with a size of its own.

A number is off by at most 1/254 of the largest of its token. Of weights as they are that would be too much, since what
tasks have in common may be far larger than that in which they differ; normalisation has taken it away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..adapters.tokenizer import WeightNormalization, WeightTokenizer


_LARGEST = 127


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """One adapter, packed.

    Attributes:
        values: (P,), int8: its P numbers, token after token, 127 being its token's largest magnitude.
        sizes: (N_w,), float32: that magnitude.
    """

    values: torch.Tensor
    sizes: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes."""
        return self.values.nbytes + self.sizes.nbytes

    @classmethod
    def from_stacks(cls, values: torch.Tensor | None, sizes: torch.Tensor | None) -> list[PackedAdapter]:
        """Those of which (n, P) and (n, N_w) are the stacks; none where there are no stacks.

        Raises:
            ValueError: If the tensors are none of packed adapters.
        """
        if values is None and sizes is None:
            return []
        if values is None or sizes is None or values.dim() != 2 or sizes.dim() != 2 or len(values) != len(sizes):
            raise ValueError("packed adapters have values of shape (n, P) and sizes of shape (n, N_w)")
        if values.dtype != torch.int8 or sizes.dtype != torch.float32 or not bool(torch.isfinite(sizes).all()):
            raise ValueError("packed adapters have values of int8 and finite sizes of float32")
        return [cls(one, size) for one, size in zip(values.unbind(), sizes.unbind(), strict=True)]


@dataclass(eq=False)
class PackedCheckpoint:
    """A packed adapter in place of a checkpoint, for [`with_replayed`][peft_dnd.pairs.PromptCheckpointDataset].

    Attributes:
        packing: What unpacks it.
        packed: The adapter; it may come later than this, but before it is read.
    """

    packing: AdapterPacking
    packed: PackedAdapter | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """PEFT's on-disk key -> float32 tensor."""
        assert self.packed is not None, "targets are written before the first item is read"
        return self.packing.unpack(self.packed)


class AdapterPacking:
    """Packs adapters and unpacks them again, by a generator's tokens and their normalisation.

    Args:
        tokenizer: The generator's.
        normalization: The generator's, with its statistics set.
    """

    def __init__(self, tokenizer: WeightTokenizer, normalization: WeightNormalization) -> None:
        self.tokenizer = tokenizer
        self._mean = normalization.mean.detach().float().cpu()
        self._scale = normalization.scale.detach().float().cpu()
        self._valid = tokenizer.valid_mask()

    @property
    def digest(self) -> str:
        """Differs where what one packs the other cannot unpack."""
        digest = hashlib.sha256(repr(self.tokenizer.grid_shape).encode())
        for tensor in (self._mean, self._scale):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def normalized(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """An adapter as normalised tokens, of the tokenizer's `grid_shape`, float32, zero where there is filling."""
        grid = self.tokenizer.encode(state_dict).cpu()
        return ((grid - self._mean) / self._scale[:, None, None]) * self._valid

    def pack(self, state_dict: Mapping[str, torch.Tensor]) -> PackedAdapter:
        """Pack an adapter, PEFT's on-disk key -> tensor.

        Raises:
            LayoutError: If it does not have the tokenizer's layout.
        """
        return self.pack_tokens(self.normalized(state_dict))

    def pack_tokens(self, tokens: torch.Tensor) -> PackedAdapter:
        """Pack normalised tokens, of the tokenizer's `grid_shape`."""
        tokens = tokens.detach().float().cpu() * self._valid
        sizes = tokens.abs().amax((1, 2))
        unit = torch.where(sizes > 0, sizes, 1.0)[:, None, None]
        return PackedAdapter((tokens / unit * _LARGEST).round()[self._valid].to(torch.int8), sizes)

    def unpack_tokens(self, packed: PackedAdapter) -> torch.Tensor:
        """The normalised tokens of a packed adapter, of the tokenizer's `grid_shape`, float32."""
        tokens = torch.zeros(self.tokenizer.grid_shape)
        tokens[self._valid] = packed.values.float()
        return tokens * (packed.sizes / _LARGEST)[:, None, None]

    def unpack(self, packed: PackedAdapter) -> dict[str, torch.Tensor]:
        """A packed adapter's matrices, PEFT's on-disk key -> float32 tensor."""
        tokens = self.unpack_tokens(packed)
        return self.tokenizer.decode(tokens * self._scale[:, None, None] + self._mean)

    def fits(self, packed: PackedAdapter) -> bool:
        """Whether a packed adapter has the sizes of this tokenizer's adapters."""
        return len(packed.values) == int(self._valid.sum()) and len(packed.sizes) == self.tokenizer.num_tokens
