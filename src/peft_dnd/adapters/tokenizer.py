# SPDX-License-Identifier: Apache-2.0
"""Weight tokens: an adapter cut into a grid of equal tokens and put together again, exactly; their normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..errors import GeneratorConfigError, LayoutError, WeightValueError
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
        self.grid_shape = (sum(self._counts), layout.max_rank, self.chunk_width)
        self._has_filling = math.prod(self.grid_shape) > layout.num_parameters

    @property
    def num_tokens(self) -> int:
        """How many tokens N_w an adapter becomes."""
        return self.grid_shape[0]

    @torch.no_grad()
    def encode(self, state_dict: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """Turn an adapter's state dict into its token grid. No gradient flows through it.

        Args:
            state_dict: PEFT on-disk key -> tensor of any floating dtype, as the layout describes it.
            out: A tensor of shape `grid_shape` to write into, for instance one item of a batch. Where many adapters
                are read one after another this saves most of the time, which goes into fresh memory.

        Returns:
            `out`, or else a new float32 tensor of shape `grid_shape`, on the tensors' device.

        Raises:
            LayoutError: If a tensor, or `out`, is missing or has another shape.
        """
        matrices = [tensor.find_in(state_dict) for tensor in self.layout.tensors]
        grid = matrices[0].new_empty(self.grid_shape, dtype=torch.float32) if out is None else self._checked(out)
        if self._has_filling:
            grid.zero_()
        width = self.chunk_width
        for tensor, matrix, chunks in zip(self.layout.tensors, matrices, grid.split(self._counts), strict=True):
            rows = matrix.reshape(tensor.rank, -1) if tensor.side == "A" else matrix.reshape(-1, tensor.rank).t()
            tokens = chunks[:, : tensor.rank]
            whole, rest = divmod(tensor.long_size, width)
            tokens[:whole].transpose(0, 1).copy_(rows[:, : whole * width].view(tensor.rank, whole, width))
            if rest:
                tokens[whole, :, :rest].copy_(rows[:, whole * width :])
        return grid

    def decode(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn a token grid into the adapter's state dict. Differentiable; padding is dropped.

        Args:
            grid: Tensor of shape `grid_shape`.

        Returns:
            PEFT on-disk key -> contiguous tensor with the grid's dtype and device, in the layout's order. None shares
            memory with the grid.

        Raises:
            LayoutError: If the grid has another shape.
        """
        parts = self.split(self._checked(grid))
        return {tensor.key: self.join(tensor, part) for tensor, part in zip(self.layout.tensors, parts, strict=True)}

    def split(self, of_tokens: torch.Tensor, axis: int = -3) -> tuple[torch.Tensor, ...]:
        """Divide what there is of each token, along an axis, into what there is of each of the layout's tensors."""
        return of_tokens.split(self._counts, axis)

    def join(self, tensor: LoraTensor, chunks: torch.Tensor) -> torch.Tensor:
        """Put one of the layout's tensors together from its tokens; differentiable.

        Args:
            tensor: The tensor.
            chunks: Its n tokens, (..., n, L_w, C_w), with any leading axes.

        Returns:
            Contiguous, of the tensor's own shape after the leading axes; it shares no memory with the tokens.
        """
        # Narrowed only where something is to be cut off: a narrowing's gradient fills a whole tensor with zeros.
        tokens = chunks if chunks.shape[-2] == tensor.rank else chunks[..., : tensor.rank, :]
        leading = chunks.shape[:-3]
        # One copy brings all into the matrix's own order; what then remains to be cut off stands at the end of
        # each row of A, and of B as a whole.
        if tensor.side == "A":
            rows = tokens.transpose(-3, -2).clone(memory_format=torch.contiguous_format).flatten(-2)
            matrix = rows if rows.shape[-1] == tensor.long_size else rows[..., : tensor.long_size].contiguous()
        else:
            rows = tokens.transpose(-2, -1).clone(memory_format=torch.contiguous_format).flatten(-3, -2)
            matrix = rows if rows.shape[-2] == tensor.long_size else rows[..., : tensor.long_size, :].contiguous()
        return matrix.view(*leading, *tensor.shape)

    def _checked(self, grid: torch.Tensor) -> torch.Tensor:
        if tuple(grid.shape) != self.grid_shape:
            raise LayoutError(f"A token grid of shape {self.grid_shape} was expected, got {tuple(grid.shape)}.")
        return grid

    def valid_mask(self) -> torch.Tensor:
        """Bool tensor of shape `grid_shape`: true where a grid entry is a weight, false where it is filling."""
        ones = {tensor.key: torch.ones(tensor.shape) for tensor in self.layout.tensors}
        return self.encode(ones).bool()

    def tensor_index(self) -> torch.Tensor:
        """Int64 tensor of shape (N_w,): which of the layout's tensors each token is a chunk of."""
        # On the CPU even where a model is being built on the meta device: decoders are built by these numbers.
        counts = torch.tensor(self._counts, device="cpu")
        return torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)


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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WeightNormalization:
        # What casts a whole module (`.bfloat16()`, DeepSpeed) would round the mean adapter: precision is never lost.
        kept = {"mean": self.mean, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < tensor.dtype.itemsize:
                setattr(self, name, tensor.to(moved.device))
        return self

    def check(self, source: str) -> None:
        """Make sure that every scale is a positive number; a wrong one would write adapters of zeros, or turned round.

        Args:
            source: What holds it, for the error.

        Raises:
            WeightValueError: If one is not.
        """
        wrong = ~(torch.isfinite(self.scale) & (self.scale > 0))
        if not self.scale.is_meta and wrong.any():
            place = int(wrong.nonzero()[0])
            raise WeightValueError(
                f"The normalisation of {source} has a scale of {self.scale[place].item():g} for the weight token "
                f"{place}; all must be positive and finite. Its weights were damaged or edited: fit or fetch it "
                "again, or set the statistics with normalization.set_statistics and save it."
            )

    def normalize(self, grid: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Weights to normalised tokens; any leading batch axes. `out` may be `grid` itself."""
        return torch.sub(grid, self.mean, out=out).div_(self.scale[:, None, None])

    def denormalize(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised tokens to weights, in float32; any leading batch axes. `out` as for [`normalize`]."""
        return denormalized(tokens, self.mean, self.scale, out=out)


def denormalized(
    tokens: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What normalised tokens (..., n, L_w, C_w) stand for, by their mean (n, L_w, C_w) and scale (n,); float32."""
    return torch.addcmul(mean, tokens.to(mean.dtype), scale[:, None, None], out=out)


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
