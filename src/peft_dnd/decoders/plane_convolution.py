# SPDX-License-Identifier: Apache-2.0
"""A "same" convolution over a small plane between many channels, in far fewer operations than the plain one.

Kernels here have 9 x 9 or 11 x 11 taps and there are hundreds of channels, so nearly all time goes into multiplying.
By the convolution theorem a tile of the output needs one product for each frequency instead of one for each of its
positions and taps. The plane is cut into tiles, each goes through a small discrete Fourier transform, and what is left
is for every frequency a matrix product over the channels: of complex numbers, in three real products each (Gauss).
Every transform is a product with a fixed real matrix as well, so that all of it is dense algebra. Nothing is
approximated; in float32 the result agrees with `conv2d` to about 1e-5 of the output's standard deviation.

Half-precision weights and inputs are taken to float32 on the way, so they lose nothing by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F


# Channels whose kernels are transformed at once: enough for efficient matrix products, few enough for the caches.
OUT_BLOCK = 64
_IN_BLOCK = 128
# Transformed inputs that are held at once, in numbers; more tiles than that are taken in turns.
_HELD_INPUTS = 100_000_000
_LARGEST_TILE = 28

# The cost of an operation relative to one of a plain convolution, which keeps a CPU core's units busy all the time.
# Fitted to one core of an AVX-512 machine (benchmarks/bench_convolution.py); a wrong guess costs time, not exactness.
_PRODUCT_COST = 1 / 0.6
_TRANSFORM_COST = 1 / 0.25
_MEMORY_COST = 16.0
# Below this many multiplications there is nothing to gain, and a gain below this factor is not worth having.
_LEAST_WORK = 5e8
_LEAST_GAIN = 1.25


class SlicedWeight(Protocol):
    """A convolution's weight (out, in, k, k) that need not be in memory as a whole: a tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """(out, in, k, k)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""

    def __getitem__(self, channels: slice, /) -> torch.Tensor:
        """The weight of some output channels."""


def same_convolution(x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolves (B, in, H, W) to (B, out, H, W) with zeros around the plane.

    Without gradients and on a CPU the Fourier form is taken where it is clearly cheaper; which form is taken depends
    on shapes and dtype alone. A weight that is no tensor is read in slices of its output channels. In float32 and
    bfloat16 the bytes are then those that the whole weight gives.

    Args:
        x: (B, in, H, W).
        weight: (out, in, k, k) with an odd k.
        bias: (out,).
    """
    if _may_transform(x, weight):
        out_channels, in_channels, kernel_size, _ = weight.shape
        plane = (x.shape[2], x.shape[3])
        tiling = choose_tiling(in_channels, out_channels, plane, kernel_size, x.dtype == torch.bfloat16)
        if tiling is not None:
            out = x.new_empty(x.shape[0], out_channels, *plane)
            for one, one_out in zip(x, out, strict=True):  # so that the batch has no influence on any byte
                _convolve_by_tiles(one, weight, bias, tiling, one_out)
            return out
    padding = weight.shape[-1] // 2
    if isinstance(weight, torch.Tensor):
        return F.conv2d(x, weight, bias, padding=padding)
    out = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    for channels in _slices(weight.shape[0], OUT_BLOCK):
        own_bias = None if bias is None else bias[channels]
        out[:, channels] = F.conv2d(x, weight[channels], own_bias, padding=padding)
    return out


def _may_transform(x: torch.Tensor, weight: SlicedWeight) -> bool:
    wants_gradients = x.requires_grad or getattr(weight, "requires_grad", False)
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not (torch.is_grad_enabled() and wants_gradients)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@dataclass(frozen=True)
class Tiling:
    """How a plane is cut, and what follows from it.

    Attributes:
        plane: (H, W).
        tile: (height, width) of an output tile.
        kernel_size: side of the kernel.
        in_channels: channels of the input.
    """

    plane: tuple[int, int]
    tile: tuple[int, int]
    kernel_size: int
    in_channels: int

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of the piece of the input that a tile of the output depends on."""
        return (self.tile[0] + self.kernel_size - 1, self.tile[1] + self.kernel_size - 1)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """How many tiles there are down and across."""
        return (math.ceil(self.plane[0] / self.tile[0]), math.ceil(self.plane[1] / self.tile[1]))

    @cached_property
    def rows(self) -> int:
        """Frequencies along the height; the other half is their mirror image, as the numbers are real."""
        return self.size[0] // 2 + 1

    @cached_property
    def products(self) -> int:
        """Real products per pair of channels and tile: three for each frequency."""
        return 3 * self.rows * self.size[1]

    @cached_property
    def columns_at_once(self) -> int:
        """How many columns of tiles are held at once, all the same number but for the last."""
        most = max(1, _HELD_INPUTS // (self.products * self.in_channels * self.grid[0]))
        return math.ceil(self.grid[1] / math.ceil(self.grid[1] / most))

    def cost(self, out_channels: int) -> float:
        """What this tiling costs, in multiplications of a plain convolution."""
        height, width = self.size
        tiles, turns = math.prod(self.grid), math.ceil(self.grid[1] / self.columns_at_once)
        pairs, taps = self.in_channels * out_channels, self.kernel_size**2
        # Products over few tiles have much to read for little to do.
        multiplied = pairs * self.products * (tiles + 16 * turns)
        kernels = turns * pairs * (2 * self.rows * taps + 2 * self.products * self.kernel_size)
        inputs = self.in_channels * tiles * 2 * width * (self.rows * height + self.products)
        outputs = out_channels * tiles * 2 * self.tile[1] * (self.products + self.rows * self.tile[0])
        moved = turns * pairs * (self.products + taps) + (self.in_channels + out_channels) * tiles * self.products
        return _PRODUCT_COST * multiplied + _TRANSFORM_COST * (kernels + inputs + outputs) + _MEMORY_COST * moved


@lru_cache(maxsize=512)
def choose_tiling(
    in_channels: int, out_channels: int, plane: tuple[int, int], kernel_size: int, half: bool
) -> Tiling | None:
    """The cheapest tiling, or `None` where a plain convolution is about as cheap.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        plane: (H, W).
        kernel_size: side of the kernel.
        half: whether the plain convolution would run in bfloat16, of which a core does two at a time.
    """
    inside = [sum(max(0, size - abs(i - kernel_size // 2)) for i in range(kernel_size)) for size in plane]
    plain = in_channels * out_channels * math.prod(inside) / (2 if half else 1)
    if plain < _LEAST_WORK:
        return None
    sides = [range(2, min(size, _LARGEST_TILE) + 1) for size in plane]
    tilings = [Tiling(plane, (down, across), kernel_size, in_channels) for down in sides[0] for across in sides[1]]
    costs = [tiling.cost(out_channels) for tiling in tilings]
    if not costs or min(costs) * _LEAST_GAIN > plain:
        return None
    return tilings[costs.index(min(costs))]


@dataclass(frozen=True)
class _Transforms:
    """The matrices, first those along the height, between real numbers and their frequencies, then along the width."""

    input_rows: torch.Tensor  # (2 rows, height)
    input_columns: torch.Tensor  # (3 width, 2 width)
    kernel_rows: torch.Tensor  # (2 rows, k)
    kernel_columns: torch.Tensor  # (3 width, 2 k)
    output_columns: torch.Tensor  # (2 tile width, 3 width)
    output_rows: torch.Tensor  # (tile height, 2 rows)


@lru_cache(maxsize=64)
def _transforms(tile: tuple[int, int], kernel_size: int) -> _Transforms:
    """Matrices of the discrete Fourier transform, complex numbers written as pairs of rows: real part, imaginary part.

    With a convolution as neural networks have it, which is a correlation, kernels enter by their complex conjugate.
    The product (p + iq)(v + iw) is made of three, a = (p + q) v, b = p (w - v) and c = q (v + w), as
    (a - c) + i(a + b).
    """
    height, width = tile[0] + kernel_size - 1, tile[1] + kernel_size - 1
    cos, sin = _waves(height, height // 2 + 1)
    # Each frequency but the first, and the last where the height is even, stands for its mirror image as well.
    mirrored = torch.full_like(cos[:, :1], 2.0)
    mirrored[0] = 1.0
    if height % 2 == 0:
        mirrored[-1] = 1.0
    input_rows = torch.stack([cos, -sin], 1).flatten(0, 1)
    kernel_rows = torch.stack([cos, sin], 1).flatten(0, 1)[:, :kernel_size]
    output_rows = torch.stack([cos * mirrored, -sin * mirrored], 1).flatten(0, 1)[:, : tile[0]].T / height
    cos, sin = _waves(width, width)
    real, imaginary = torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)
    input_columns = torch.cat([real + imaginary, real, imaginary])
    cos, sin = cos[:, :kernel_size], sin[:, :kernel_size]
    real, imaginary = torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)
    kernel_columns = torch.cat([real, imaginary - real, real + imaginary])
    cos, sin = (wave[:, : tile[1]].T / width for wave in _waves(width, width))
    output_columns = torch.cat(
        [torch.cat([cos - sin, -sin, -cos], 1), torch.cat([cos + sin, cos, -sin], 1)],
    )
    matrices = (input_rows, input_columns, kernel_rows, kernel_columns, output_columns, output_rows)
    return _Transforms(*(matrix.float().contiguous() for matrix in matrices))


def _waves(size: int, frequencies: int) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.arange(size, dtype=torch.float64, device="cpu")
    angles = 2 * math.pi / size * torch.outer(steps[:frequencies], steps)
    return angles.cos(), angles.sin()


@torch.no_grad()
def _convolve_by_tiles(
    x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None, tiling: Tiling, out: torch.Tensor
) -> None:
    """Convolves (in, H, W) into `out` (out, H, W)."""
    matrices = _transforms(tiling.tile, tiling.kernel_size)
    (down, across), (height, width) = tiling.grid, tiling.tile
    kernels = _KernelTransform(tiling, matrices)
    for columns in _slices(across, tiling.columns_at_once):
        inputs = _transform_inputs(x, columns, tiling, matrices)
        first, stop = columns.start * width, min(columns.stop * width, tiling.plane[1])
        for channels in _slices(len(out), OUT_BLOCK):
            found = kernels.multiply(weight[channels], inputs)
            tiles = _transform_back(found, tiling, matrices).unflatten(-1, (-1, down))
            rows = tiles.permute(2, 4, 0, 3, 1).reshape(-1, down * height, (columns.stop - columns.start) * width)
            rows = rows[:, : tiling.plane[0], : stop - first]
            out[channels, :, first:stop] = rows if bias is None else rows + bias[channels].float()[:, None, None]


def _transform_inputs(x: torch.Tensor, columns: slice, tiling: Tiling, matrices: _Transforms) -> torch.Tensor:
    """Some columns of tiles of (in, H, W), to (products, in, tiles), tiles column by column."""
    (height, width), (tile_height, tile_width), down = tiling.size, tiling.tile, tiling.grid[0]
    reach, channels, count = tiling.kernel_size // 2, tiling.in_channels, columns.stop - columns.start
    # What these columns depend on, with the channels last and zeros where it reaches beyond the plane.
    begin = columns.start * tile_width - reach
    inside = slice(max(begin, 0), min(begin + (count - 1) * tile_width + width, tiling.plane[1]))
    padded = _empty(down * tile_height + 2 * reach, (count - 1) * tile_width + width, channels).zero_()
    padded[reach : reach + tiling.plane[0], inside.start - begin : inside.stop - begin] = x[:, :, inside].permute(
        1, 2, 0
    )
    transformed = padded.new_empty(tiling.products, count, down * channels)
    pieces = padded.new_empty(height, width, down, channels)
    by_rows = padded.new_empty(2 * tiling.rows, width * down * channels)
    for index in range(count):
        first = index * tile_width
        pieces.copy_(padded[:, first : first + width].unfold(0, height, tile_height).permute(3, 1, 0, 2))
        torch.mm(matrices.input_rows, pieces.view(height, -1), out=by_rows)
        pairs = by_rows.view(tiling.rows, 2 * width, -1)
        found = torch.bmm(matrices.input_columns.expand(tiling.rows, -1, -1), pairs)
        transformed[:, index] = found.view(tiling.products, -1)
    return transformed.view(tiling.products, -1, channels).transpose(1, 2)


class _KernelTransform:
    """Transforms kernels and multiplies them with transformed inputs, block by block in memory that is used again."""

    def __init__(self, tiling: Tiling, matrices: _Transforms) -> None:
        self._tiling, self._matrices = tiling, matrices
        pairs = OUT_BLOCK * _IN_BLOCK
        self._taps = _empty(tiling.kernel_size**2 * pairs)
        self._by_rows = _empty(2 * tiling.rows * tiling.kernel_size * pairs)
        self._transformed = _empty(tiling.products * pairs)

    def multiply(self, kernels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Kernels (o, in, k, k) and transformed inputs (products, in, tiles) to (products, o, tiles)."""
        found = inputs.new_empty(inputs.shape[0], kernels.shape[0], inputs.shape[2])
        for channels in _slices(kernels.shape[1], _IN_BLOCK):
            transformed = self._transform(kernels[:, channels])
            torch.baddbmm(found, transformed, inputs[:, channels], beta=1.0 if channels.start else 0.0, out=found)
        return found

    def _transform(self, kernels: torch.Tensor) -> torch.Tensor:
        rows, size, (width, products) = (
            self._tiling.rows,
            kernels.shape[-1],
            (self._tiling.size[1], self._tiling.products),
        )
        pairs = kernels.shape[0] * kernels.shape[1]
        taps = self._taps[: size**2 * pairs].view(size**2, pairs)
        taps.copy_(kernels.reshape(pairs, size**2).float().t())
        by_rows = self._by_rows[: 2 * rows * size * pairs].view(2 * rows, size * pairs)
        torch.mm(self._matrices.kernel_rows, taps.view(size, size * pairs), out=by_rows)
        transformed = self._transformed[: products * pairs].view(rows, 3 * width, pairs)
        along_width = self._matrices.kernel_columns.expand(rows, -1, -1)
        torch.bmm(along_width, by_rows.view(rows, 2 * size, pairs), out=transformed)
        return transformed.view(products, *kernels.shape[:2])


def _transform_back(found: torch.Tensor, tiling: Tiling, matrices: _Transforms) -> torch.Tensor:
    """(products, o, tiles) to (tile height, tile width, o, tiles)."""
    (height, width), (_, channels, tiles) = tiling.tile, found.shape
    by_columns = matrices.output_columns @ found.view(tiling.rows, 3 * tiling.size[1], -1)
    back = matrices.output_rows @ by_columns.view(2 * tiling.rows, -1)
    return back.view(height, width, channels, tiles)


def _empty(*shape: int) -> torch.Tensor:
    # Whatever defaults are set around this.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _slices(stop: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))
