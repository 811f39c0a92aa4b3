# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Adapter weights to a grid of equal tokens and back, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .errors import GeneratorConfigError, LayoutError
from .layout import AdapterLayout, LoraTensor


_CHUNK_WIDTHS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 16)
# A tensor that no training adapter has moved would have scale zero. It gets the larger of two small ones instead,
# about float32's resolution of its own size and a trifle beside the other tensors, so that the way back stays exact
# for any adapter while a decoder's errors there come to nothing.
_FLOOR_OF_OWN_SIZE = 1e-7
_FLOOR_OF_LARGEST_SCALE = 1e-12


class WeightTokenizer:
    """Cuts the matrices of an adapter into equal two-dimensional tokens, and puts them together again.

    Each matrix is seen with its rank first: A as (r, in), B transposed as (r, out). It is cut along its long side into
    chunks of `chunk_width`; a chunk, r rows by `chunk_width` columns, is one token (arXiv 2506.16406). The last chunk
    of a matrix and tokens of a smaller rank are filled with zeros, which [`valid_mask`] tells apart. The tokens stand
    in the layout's order. No number is changed, so the way there and back is exact to the bit.

    Args:
        layout: What is cut.
        chunk_width: Columns per token; `None` takes [`choose_chunk_width`].

    Attributes:
        layout: The layout.
        chunk_width: Columns per token.
        grid_shape: (number of tokens N_w, rows per token L_w = the largest rank, columns per token C_w).

    Raises:
        GeneratorConfigError: If `chunk_width` is not positive.
    """

    def __init__(self, layout: AdapterLayout, chunk_width: int | None = None) -> None:
        if chunk_width is not None and chunk_width < 1:
            raise GeneratorConfigError(f"chunk_width must be a positive integer or None, got {chunk_width}.")
        self.layout = layout
        self.chunk_width = choose_chunk_width(layout) if chunk_width is None else chunk_width
        self._counts = [math.ceil(tensor.long_size / self.chunk_width) for tensor in layout.tensors]
        self._groups = _group_alike(layout, self._counts)
        self.grid_shape = (sum(self._counts), layout.max_rank, self.chunk_width)

    @property
    def num_tokens(self) -> int:
        """How many tokens N_w an adapter becomes."""
        return self.grid_shape[0]

    def encode(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Turn an adapter's state dict into its token grid.

        Args:
            state_dict: PEFT on-disk key -> tensor of any floating dtype, as the layout describes it.

        Returns:
            Float32 tensor of shape `grid_shape`, on the tensors' device.

        Raises:
            LayoutError: If a tensor is missing or has another shape.
        """
        matrices = [_find(state_dict, tensor) for tensor in self.layout.tensors]
        grid = matrices[0].new_zeros(self.grid_shape, dtype=torch.float32)
        for group in self._groups:
            alike = torch.cat([matrices[i].reshape(1, *group.stored_shape) for i in group.tensors]).float()
            rows = alike if group.side == "A" else alike.transpose(1, 2)
            missing = group.count * self.chunk_width - group.long_size
            filled = nn.functional.pad(rows, (0, missing)) if missing else rows
            chunks = filled.unflatten(2, (group.count, self.chunk_width)).transpose(1, 2)
            grid[group.tokens.to(grid.device), : group.rank] = chunks.flatten(0, 1)
        return grid

    def decode(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn a token grid into the adapter's state dict. Differentiable; padding is dropped.

        Args:
            grid: Tensor of shape `grid_shape`.

        Returns:
            PEFT on-disk key -> contiguous tensor with the grid's dtype and device, in the layout's order.

        Raises:
            LayoutError: If the grid has another shape.
        """
        if tuple(grid.shape) != self.grid_shape:
            raise LayoutError(f"A token grid of shape {self.grid_shape} was expected, got {tuple(grid.shape)}.")
        found: dict[int, torch.Tensor] = {}
        for group in self._groups:
            chunks = grid[group.tokens.to(grid.device), : group.rank].unflatten(0, (-1, group.count)).transpose(1, 2)
            rows = chunks.flatten(2)[:, :, : group.long_size]
            matrices = rows if group.side == "A" else rows.transpose(1, 2)
            found.update(zip(group.tensors, matrices.contiguous().unbind(), strict=True))
        return {tensor.key: found[i].view(tensor.shape) for i, tensor in enumerate(self.layout.tensors)}

    def valid_mask(self) -> torch.Tensor:
        """Bool tensor of shape `grid_shape`: true where a grid entry is a weight, false where it is filling."""
        ones = {tensor.key: torch.ones(tensor.shape) for tensor in self.layout.tensors}
        return self.encode(ones).bool()

    def tensor_index(self) -> torch.Tensor:
        """Int64 tensor of shape (N_w,): which of the layout's tensors each token is a chunk of."""
        return torch.repeat_interleave(torch.arange(len(self._counts)), torch.tensor(self._counts))


def choose_chunk_width(layout: AdapterLayout) -> int:
    """Choose the token width that wastes least on filling; of equals the widest.

    Candidates are the divisors of the sizes' greatest common divisor and a ladder of usual widths, from 16 to 512. For
    Qwen2.5 0.5B, 1.5B and 7B this gives the paper's 128, 256 and 512.

    Args:
        layout: The layout to be cut.
    """
    sizes = [tensor.long_size for tensor in layout.tensors]
    common = math.gcd(*sizes)
    divisors = {width for width in range(_CHUNK_WIDTHS[-1], _CHUNK_WIDTHS[0] + 1) if common % width == 0}
    candidates = sorted(divisors | set(_CHUNK_WIDTHS), reverse=True)
    return min(candidates, key=lambda width: sum(math.ceil(size / width) * width for size in sizes))


class WeightNormalization(nn.Module):
    """Shifts and scales token grids by what the training adapters have in common.

    z = (x - mean) / scale, with the mean entry by entry over the training adapters and one scale per tensor of the
    adapter, the root mean square of its deviations from that mean. A decoder that writes zeros therefore writes the
    mean adapter (the start that Text-to-LoRA, arXiv 2506.06105, found to be needed), and tensors as unlike in size as
    A and B weigh alike. Until [`set_statistics`] is called it changes nothing.

    Args:
        grid_shape: (N_w, L_w, C_w).
    """

    mean: torch.Tensor
    scale: torch.Tensor
    fitted: torch.Tensor

    def __init__(self, grid_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(grid_shape))
        self.register_buffer("scale", torch.ones(grid_shape[0]))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def reset_parameters(self) -> None:
        """Go back to changing nothing."""
        self.mean.zero_()
        self.scale.fill_(1.0)
        self.fitted.zero_()

    def set_statistics(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Take the mean, of shape `grid_shape`, and the scale of each token, of shape (N_w,), all positive."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.fitted.fill_(True)

    def normalize(self, grid: torch.Tensor) -> torch.Tensor:
        """Weights to normalised tokens; any leading batch axes."""
        return (grid - self.mean).div_(self.scale[:, None, None])

    def denormalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised tokens to weights, in float32; any leading batch axes."""
        return torch.addcmul(self.mean, tokens.to(self.mean.dtype), self.scale[:, None, None])


def weight_statistics(
    tokenizer: WeightTokenizer, weighted_grids: Iterable[tuple[torch.Tensor, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scale of adapters, in one pass and float64, for [`WeightNormalization.set_statistics`].

    Args:
        tokenizer: The tokenizer that made the grids.
        weighted_grids: Pairs of a token grid and its weight; weights need not sum to one.

    Returns:
        Float32 mean of shape `grid_shape`, and float32 scale of shape (N_w,), equal for the tokens of one tensor.

    Raises:
        ValueError: If there is no grid.
    """
    total = 0.0
    first = torch.zeros(tokenizer.grid_shape, dtype=torch.float64)
    second = torch.zeros(tokenizer.num_tokens, dtype=torch.float64)
    for grid, weight in weighted_grids:
        values = grid.to("cpu", torch.float64)
        first.add_(values, alpha=weight)
        second.add_(values.square_().sum((1, 2)), alpha=weight)
        total += weight
    if total <= 0.0:
        raise ValueError("Weight statistics need at least one adapter, and got none.")
    mean = first / total
    size = _per_tensor(tokenizer, second / total).sqrt()
    scale = _per_tensor(tokenizer, (second / total - mean.square().sum((1, 2))).clamp_min_(0.0)).sqrt()
    floor = torch.maximum(_FLOOR_OF_OWN_SIZE * size, _FLOOR_OF_LARGEST_SCALE * scale.max())
    scale = torch.maximum(scale, floor)
    # Where every number of every adapter is zero any scale is right, so take one that changes nothing.
    scale = torch.where(scale > 0.0, scale, 1.0)
    return mean.float(), scale[tokenizer.tensor_index()].float()


def _per_tensor(tokenizer: WeightTokenizer, per_token: torch.Tensor) -> torch.Tensor:
    """Means over the entries of each of the layout's tensors, from sums over the entries of each token."""
    sizes = torch.tensor([tensor.num_parameters for tensor in tokenizer.layout.tensors], dtype=torch.float64)
    return torch.zeros_like(sizes).index_add_(0, tokenizer.tensor_index(), per_token) / sizes


@dataclass(frozen=True)
class _Group:
    """Matrices of one form, handled in one go: a deep model repeats a handful of forms in every layer."""

    side: str
    rank: int
    long_size: int
    count: int  # tokens a matrix
    tensors: tuple[int, ...]  # which of the layout's tensors
    tokens: torch.Tensor  # their rows in the grid, matrix by matrix

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The matrices' shape as PEFT stores them, with all axes but the rank flattened."""
        return (self.rank, self.long_size) if self.side == "A" else (self.long_size, self.rank)


def _group_alike(layout: AdapterLayout, counts: list[int]) -> list[_Group]:
    members: dict[tuple[str, int, int], list[int]] = {}
    for i, tensor in enumerate(layout.tensors):
        members.setdefault((tensor.side, tensor.rank, tensor.long_size), []).append(i)
    starts = torch.tensor([0, *counts], device="cpu").cumsum(0)
    groups = []
    for (side, rank, long_size), indices in members.items():
        count = counts[indices[0]]
        tokens = (starts[indices][:, None] + torch.arange(count, device="cpu")).flatten()
        groups.append(_Group(side, rank, long_size, count, tuple(indices), tokens))
    return groups


def _find(state_dict: Mapping[str, torch.Tensor], tensor: LoraTensor) -> torch.Tensor:
    found = state_dict.get(tensor.key)
    if found is None or tuple(found.shape) != tensor.shape:
        what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise LayoutError(f"The adapter does not fit its layout: {tensor.key!r} {what}; expected {tensor.shape}.")
    return found
