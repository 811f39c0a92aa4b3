# SPDX-License-Identifier: Apache-2.0
"""The token format of the released generators, in which each token carries its own scale.

Read this for what was published. Our own tokens are better kept: see [`WeightTokenizer`] and the table in
`docs/explanation/published-format.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce

import torch

from ..errors import LayoutError
from .layout import AdapterLayout, LoraModule
from .tokenizer import WeightTokenizer


# Within a layer, modules stand in this order; a released generator knows no others.
_MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
_MARGIN = 2  # rows at the bottom and columns on the right that hold the scale codes

# A chunk of mean m and standard deviation s has the codes 8 m and log(0.9 s + 0.1) + 1.6.
_MEAN_FACTOR = 8.0
_DEVIATION_FACTOR = 0.9
_DEVIATION_FLOOR = 0.1
_LOG_SHIFT = 1.6


class PublishedTokenizer(WeightTokenizer):
    """Turns adapters into the tokens of the generators released with arXiv 2506.16406, and those back to adapters.

    Modules are ordered by layer, then q, k, v, o, up, gate, down; in each come the chunks of A (r rows by
    `chunk_width` columns), then those of B transposed. A chunk of mean m and sample standard deviation s becomes
    (chunk - m) / s, r rows by `chunk_width` columns, and gets a margin of two rows below and two columns on the right,
    which repeats a block of 2 by 2: both its rows are 8 m, log(0.9 s + 0.1) + 1.6. Reading tokens, the block is the
    mean of that over the rows' margin and that over the columns' margin; m and s are computed for each of its two rows
    and then averaged. Every entry counts in the loss, the margins included.

    The codes make this format lossy: in bfloat16 a chunk whose standard deviation is 1e-4, as B's are early in
    training, comes back five times too large. Numbers are computed in the dtype of the matrices (on the way there) and
    of the tokens (on the way back); the release does both in bfloat16, so to repeat it to the bit give it that.

    A chunk in which all numbers are equal, B's at the start of training for one, becomes zeros; the published code
    divides by zero there.

    Args:
        layout: What is cut: LoRA of one even rank on q, k, v, o, up, gate and down projections, or some of them.
        chunk_width: Columns per chunk, even, and a divisor of every size: 128, 256 and 512 in what was released for
            0.5B, for 1.5B and 3B, and for 7B. `None` takes [`choose_chunk_width`], which gives these.

    Attributes:
        layout: The layout.
        chunk_width: Columns per chunk.
        grid_shape: (number of tokens N_w, r + 2, `chunk_width` + 2).

    Raises:
        LayoutError: If the format has no place for such a layout.
    """

    def __init__(self, layout: AdapterLayout, chunk_width: int | None = None) -> None:
        super().__init__(layout, chunk_width)
        _check_layout(layout, self.chunk_width)
        self._chunks = WeightTokenizer(layout, self.chunk_width)
        tokens, rows, columns = self._chunks.grid_shape
        self.grid_shape = (tokens, rows + _MARGIN, columns + _MARGIN)
        # Chunks stand in the layout's order, with the chunks of a module side by side: A's, then B's, as here.
        module_order = sorted(layout.modules, key=_published_key)
        place = {module.name: i for i, module in enumerate(module_order)}
        with torch.device("cpu"):  # a generator may be built on the meta device
            chunk_index = self._chunks.tensor_index()
            place_of_tensor = torch.tensor([place[tensor.module] for tensor in layout.tensors])
        self._order = torch.argsort(place_of_tensor[chunk_index], stable=True)
        self._back = torch.argsort(self._order)
        self._tensor_index = chunk_index[self._order]

    @torch.no_grad()
    def encode(self, state_dict: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """Turn an adapter's state dict into its token grid. No gradient flows through it.

        Args:
            state_dict: PEFT on-disk key -> tensor, as the layout describes it. The arithmetic is done in its dtype.
            out: A tensor of shape `grid_shape` to write into.

        Returns:
            `out`, or else a new float32 tensor of shape `grid_shape`, on the tensors' device.

        Raises:
            LayoutError: If a tensor, or `out`, is missing or has another shape.
        """
        plain = self._chunks.encode(state_dict)
        dtype = reduce(torch.promote_types, {state_dict[tensor.key].dtype for tensor in self.layout.tensors})
        chunks = plain[self._order.to(plain.device)].to(dtype)
        mean, deviation = chunks.mean((1, 2)), chunks.std((1, 2))
        divisor = torch.where(deviation > 0, deviation, 1)[:, None, None]
        log_deviation = torch.log(deviation * _DEVIATION_FACTOR + _DEVIATION_FLOOR) + _LOG_SHIFT
        codes = torch.stack((mean * _MEAN_FACTOR, log_deviation), dim=1).float()[:, None, :]
        _, rank, width = chunks.shape
        grid = plain.new_empty(self.grid_shape) if out is None else self._checked(out)
        grid[:, :rank, :width] = (chunks - mean[:, None, None]) / divisor
        grid[:, rank:, :] = codes.repeat(1, _MARGIN, self.grid_shape[2] // 2)
        grid[:, :, width:] = codes
        return grid

    def decode(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn a token grid into the adapter's state dict. Differentiable.

        Args:
            grid: Tensor of shape `grid_shape`.

        Returns:
            PEFT on-disk key -> contiguous tensor with the grid's dtype and device, in the layout's order.

        Raises:
            LayoutError: If the grid has another shape.
        """
        rows_margin = self._checked(grid)[:, -_MARGIN:, :].unflatten(2, (-1, 2)).mean(2)
        columns_margin = grid[:, :, -_MARGIN:].unflatten(1, (-1, 2)).mean(1)
        block = (rows_margin + columns_margin) * 0.5
        means = block[:, :, 0] / _MEAN_FACTOR
        deviations = (torch.exp(block[:, :, 1] - _LOG_SHIFT) - _DEVIATION_FLOOR) / _DEVIATION_FACTOR
        mean, deviation = ((both[:, 0] + both[:, 1]) / 2 for both in (means, deviations))
        chunks = grid[:, :-_MARGIN, :-_MARGIN] * deviation[:, None, None] + mean[:, None, None]
        return self._chunks.decode(chunks[self._back.to(grid.device)])

    def valid_mask(self) -> torch.Tensor:
        """Bool tensor of shape `grid_shape`, true throughout: the published loss counts the margins as well."""
        return torch.ones(self.grid_shape, dtype=torch.bool)

    def tensor_index(self) -> torch.Tensor:
        """Int64 tensor of shape (N_w,): which of the layout's tensors each token is a chunk of."""
        return self._tensor_index.clone()


def published_place(module: str) -> tuple[int, str]:
    """What tells modules apart in the release: the number of the layer and the last part of the name.

    >>> published_place("model.layers.3.self_attn.q_proj")
    (3, 'q_proj')

    Raises:
        LayoutError: If the name has no such parts.
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{module}")
    projection = module.rpartition(".")[2]
    if len(numbers) != 1 or projection not in _MODULE_ORDER:
        raise LayoutError(
            f"The published token format has no place for the module {module!r}: it knows layers, each with a number, "
            f"and in them {', '.join(_MODULE_ORDER)}. Adapt these alone, or use token_format='chunks'."
        )
    return int(numbers[0]), projection


def _published_key(module: LoraModule) -> tuple[int, int]:
    layer, projection = published_place(module.name)
    return layer, _MODULE_ORDER.index(projection)


def _check_layout(layout: AdapterLayout, chunk_width: int) -> None:
    rank = layout.modules[0].rank
    if rank % 2 or chunk_width % 2:
        raise LayoutError(
            f"The published token format repeats blocks of 2 by 2 along its margins, so the rank ({rank}) and the "
            f"chunk width ({chunk_width}) must be even. Use token_format='chunks'."
        )
    places: dict[tuple[int, int], str] = {}
    for module in layout.modules:
        place = _published_key(module)
        other = places.setdefault(place, module.name)
        if other != module.name:
            raise LayoutError(
                f"The published token format cannot tell {other!r} and {module.name!r} apart: both are the "
                f"{_MODULE_ORDER[place[1]]} of layer {place[0]}. Adapt the language layers alone."
            )
        if module.rank != rank:
            raise LayoutError(
                f"The published token format has one rank for all modules, but {module.name!r} has {module.rank} and "
                f"{layout.modules[0].name!r} {rank}. Use token_format='chunks'."
            )
        for tensor in module.tensors:
            if tensor.long_size % chunk_width:
                raise LayoutError(
                    f"The published token format cuts evenly, but {tensor.key!r} has {tensor.long_size} columns, no "
                    f"multiple of the chunk width {chunk_width}. Name a chunk_width that divides all sizes."
                )
