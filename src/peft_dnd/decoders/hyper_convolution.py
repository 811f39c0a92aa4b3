# SPDX-License-Identifier: Apache-2.0
"""The cascaded hyper-convolution decoder: token states of N prompts in, a grid of weight tokens out.

Source: Drag-and-Drop LLMs (arXiv 2506.16406), whose text describes the layer and whose published code fixes what the
text leaves open (the order of the axes, the kernels' planes, where the bias stands).

Axes, in this order everywhere: N prompts, L positions in a prompt, C features. On the way out they mean N_w weight
tokens of L_w rows by C_w columns. B is the batch of tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import GeneratorConfigError
from .cascade import check_cascade, derive_cascade
from .checks import GridShape, check_shape
from .length_projection import LengthProjection
from .plane_convolution import same_convolution


# The names under which the published code stores one layer, and ours; the published decoder's layer i has the prefix
# `model.decoder.module_list.{i}.`, ours `layers.{i}.`. All shapes agree, so tensors move over as they are.
PUBLISHED_PARAMETER_NAMES: dict[str, str] = {
    "linear1.norm.weight": "norm.weight",
    "linear1.norm.bias": "norm.bias",
    "linear1.conv1w.weight": "width_first_width.weight",
    "linear1.conv1h.weight": "width_first_height.weight",
    "linear1.conv2h.weight": "height_first_height.weight",
    "linear1.conv2w.weight": "height_first_width.weight",
    "linear1.bias": "bias",
    "linear2.weight": "prompt_axis.weight",
    "linear2.bias": "prompt_axis.bias",
}

# E[tanh(z)^2] for z ~ N(0, 1). The branches enter the mean of three with the variances 1 and this, the bias with 0.
_TANH_VARIANCE = 0.3943
_BRANCH_MEAN_GAIN = 3.0 / math.sqrt(1.0 + _TANH_VARIANCE)


def _mean_taps(size: int, kernel_size: int) -> float:
    """How many of a "same" kernel's taps lie inside an axis of this size, averaged over the axis' positions."""
    reach = kernel_size // 2
    return sum(max(0, size - abs(offset)) for offset in range(-reach, reach + 1)) / size


class PlaneConvolution(nn.Module):
    """A "same" two-dimensional convolution over a plane of known size, initialised for that plane.

    Weights are drawn uniformly with the variance `gain^2 / fan_in`, where `fan_in` counts the input channels times the
    kernel's taps *that lie inside the plane*, averaged over its positions. Grids here are often narrower than the
    kernel (a 9 x 9 kernel over 4 rows), and the usual fan-in, which counts every tap, would shrink the signal there by
    up to the kernel's width. Over random weights the output's mean square is then gain^2 times the input's. The bias
    starts at zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        plane: (height, width) of the plane that the kernel runs over.
        kernel_size: odd side of the square kernel.
        bias: whether each output channel has a bias.
        gain: standard deviation of the output for an input of standard deviation 1.
        zero_init: start with weights of zero instead.

    Attributes:
        reads_in_slices: names of parameters that `forward` reads by slices of their first axis alone, so that they
            need not be in memory as a whole.
    """

    reads_in_slices = ("weight",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        plane: tuple[int, int],
        kernel_size: int,
        *,
        bias: bool = False,
        gain: float = 1.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.plane = plane
        self.gain = gain
        self.zero_init = zero_init
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, by `torch.nn.init` alone so that transformers can guard what it has loaded."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.zero_init:
            nn.init.zeros_(self.weight)
            return
        _, in_channels, kernel_size, _ = self.weight.shape
        fan_in = in_channels * _mean_taps(self.plane[0], kernel_size) * _mean_taps(self.plane[1], kernel_size)
        bound = self.gain * math.sqrt(3.0 / fan_in)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves (B, in_channels, height, width) to (B, out_channels, height, width)."""
        return same_convolution(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `repr` tells of this module."""
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, plane={self.plane}, kernel_size={kernel_size}"


class HyperConvolutionLayer(nn.Module):
    """One hyper-convolution layer, (B, N, L, C) -> (B, N', L', C').

    With every convolution "same" over the two axes that are not its channels:

        x   = LayerNorm over (L, C), for each prompt by itself
        W   = convolve channels L -> L' (convolve channels C -> C' (x))          width first, no bias
        H   = tanh(convolve channels C -> C' (convolve channels L -> L' (x)))    height first, no bias, other weights
        y   = (W + H + b) / 3                                                    b: (L', C')
        z   = convolve channels N -> N' (y)                                      with a bias
        out = input + z where the shapes agree, else z

    Kernels over channels C run over the plane (L, N), those over channels L over (N, C), and those over channels N
    over (L, C); a kernel's first side belongs to the axis named first. Source: arXiv 2506.16406 and its published
    code; `PUBLISHED_PARAMETER_NAMES` maps the parameters of the one to the other, tensor by tensor. Initial weights
    are ours (see `PlaneConvolution`): every branch and every layer of a cascade gives a standard deviation of about 1,
    whatever the shapes, where PyTorch's defaults, which the published code takes, give layers of 0.02 to 0.07.

    `reset_parameters`, here and in the submodules, initialises what a module holds directly, which is the convention
    by which FSDP and transformers fill a model that was built on the meta device, one module at a time.

    Args:
        in_shape: (N, L, C).
        out_shape: (N', L', C').
        kernel_size: odd side of every kernel.
        zero_init_output: start with `z` equal to zero.
        residual: whether the input is added to `z`. `None`: where the shapes agree, which is the published rule.

    Raises:
        GeneratorConfigError: a shape is not three positive integers; the kernel is even, for which "same" would shift
            the grid by half a position; a residual is asked for between different shapes.
    """

    def __init__(
        self,
        in_shape: GridShape,
        out_shape: GridShape,
        kernel_size: int = 9,
        *,
        zero_init_output: bool = False,
        residual: bool | None = None,
    ) -> None:
        super().__init__()
        n_in, l_in, c_in = self.in_shape = check_shape("in_shape", in_shape)
        n_out, l_out, c_out = self.out_shape = check_shape("out_shape", out_shape)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or not kernel_size % 2:
            raise GeneratorConfigError(
                f"kernel_size must be a positive odd integer, so that grids keep their size, but is {kernel_size!r}."
            )
        if residual and self.in_shape != self.out_shape:
            raise GeneratorConfigError(f"A residual needs equal shapes, not {self.in_shape} and {self.out_shape}.")
        self.residual = self.in_shape == self.out_shape if residual is None else residual
        self.norm = nn.LayerNorm((l_in, c_in))
        self.width_first_width = PlaneConvolution(c_in, c_out, (l_in, n_in), kernel_size)
        self.width_first_height = PlaneConvolution(l_in, l_out, (n_in, c_out), kernel_size)
        self.height_first_height = PlaneConvolution(l_in, l_out, (n_in, c_in), kernel_size)
        self.height_first_width = PlaneConvolution(c_in, c_out, (l_out, n_in), kernel_size)
        self.bias = nn.Parameter(torch.empty(l_out, c_out))
        self.prompt_axis = PlaneConvolution(
            n_in,
            n_out,
            (l_out, c_out),
            kernel_size,
            bias=True,
            gain=_BRANCH_MEAN_GAIN,
            zero_init=zero_init_output,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the one parameter that is this module's own, the bias of the branches, to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps (B, N, L, C) to (B, N', L', C')."""
        x = self.norm(states)
        width_first = self.width_first_width(x.permute(0, 3, 2, 1))  # (B, C', L, N)
        width_first = self.width_first_height(width_first.permute(0, 2, 3, 1))  # (B, L', N, C')
        height_first = self.height_first_height(x.transpose(1, 2))  # (B, L', N, C)
        height_first = torch.tanh(self.height_first_width(height_first.permute(0, 3, 1, 2)))  # (B, C', L', N)
        y = (width_first.transpose(1, 2) + height_first.permute(0, 3, 2, 1) + self.bias) / 3
        z = self.prompt_axis(y)
        return states + z if self.residual else z

    def extra_repr(self) -> str:
        """What `repr` tells of this module."""
        return f"{self.in_shape} -> {self.out_shape}, residual={self.residual}"


class HyperConvolutionDecoder(nn.Module):
    """A cascade of hyper-convolution layers from the prompts' token states to a grid of weight tokens.

    Source: arXiv 2506.16406. Two things differ from its published code, neither of them in the layers. States at
    masked positions are set to zero on entry, so what the encoder wrote at padding cannot reach the adapter. And with
    `zero_init_output` the last convolution starts at zero, so that an unfitted decoder gives exactly zero, which in
    normalised token space is the mean training adapter; that idea is Text-to-LoRA's (arXiv 2506.06105).

    Set `gradient_checkpointing` (transformers' own switch does) to recompute each layer in the backward pass of
    training instead of keeping its activations; gradients are the same.

    Args:
        condition_shape: (N, L, C): prompts, positions in a prompt, features of the text encoder.
        token_shape: (N_w, L_w, C_w): weight tokens, rows, columns.
        cascade: every shape from `condition_shape` (with a length projection, with its length for L) to `token_shape`,
            both included. `None`: `derive_cascade`.
        kernel_size: odd side of every kernel; the published ones are 9 and 11.
        zero_init_output: start from the mean adapter rather than from a random one of standard deviation about 1,
            which must first be unlearned. The last layer then has no residual even where its shapes agree, or the
            condition itself would be written.
        length_projection: for long prompts, the settings of a `LengthProjection` that stands before the cascade:
            `{"length": 1000, "scrambled": false}`, where `scrambled` is as in what was released.

    Attributes:
        condition_shape: (N, L, C).
        cascade: the resolved tuple of shapes.
        length_projection: the `LengthProjection`, or `None`.
        gradient_checkpointing: whether layers are recomputed in the backward pass of training.

    Raises:
        GeneratorConfigError: an impossible shape, cascade or kernel.
    """

    reads_sets = False
    _no_split_modules = ("HyperConvolutionLayer",)  # what FSDP shards and gathers one by one, and no device map splits

    def __init__(
        self,
        condition_shape: Iterable[int],
        token_shape: Iterable[int],
        *,
        cascade: Iterable[Iterable[int]] | None = None,
        kernel_size: int = 9,
        zero_init_output: bool = True,
        length_projection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        first = self.condition_shape = check_shape("condition_shape", condition_shape)
        last = check_shape("token_shape", token_shape)
        projection = None if length_projection is None else LengthProjection.from_settings(first[1], length_projection)
        self.length_projection = projection
        if projection is not None:
            first = (first[0], projection.length, first[2])
        self.cascade = derive_cascade(first, last) if cascade is None else check_cascade(cascade, first, last)
        self.kernel_size = kernel_size
        self.zero_init_output = zero_init_output
        self.gradient_checkpointing = False
        steps = list(itertools.pairwise(self.cascade))
        self.layers = nn.ModuleList(HyperConvolutionLayer(*step, kernel_size) for step in steps[:-1])
        self.layers.append(
            HyperConvolutionLayer(
                *steps[-1],
                kernel_size,
                zero_init_output=zero_init_output,
                residual=False if zero_init_output else None,
            )
        )

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that build this very decoder, whatever rule a later version derives a cascade by."""
        settings: dict[str, Any] = {
            "cascade": [list(shape) for shape in self.cascade],
            "kernel_size": self.kernel_size,
            "zero_init_output": self.zero_init_output,
        }
        if self.length_projection is not None:
            settings["length_projection"] = self.length_projection.settings
        return settings

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Writes one grid of weight tokens for each task of a batch.

        Args:
            states: (B, N, L, C) floating point, the text encoder's state of every token of every prompt; cast to the
                decoder's dtype. What stands at masked positions, NaN included, has no effect.
            mask: (B, N, L), bool or a number, zero at padding. A prompt may be masked wholly.

        Returns:
            (B, N_w, L_w, C_w) tokens in normalised space.

        Raises:
            GeneratorConfigError: states or mask do not have the shapes that this decoder was built for.
        """
        if states.dim() != 4 or tuple(states.shape[1:]) != self.condition_shape:
            raise GeneratorConfigError(
                f"Condition states must have the shape (batch, N, L, C) with (N, L, C) = {self.condition_shape}, but "
                f"have {tuple(states.shape)}. Encode the prompts with the number of prompts, the length and the text "
                "encoder that this decoder was built for."
            )
        if mask.shape != states.shape[:3]:
            raise GeneratorConfigError(
                f"The condition mask must have the shape {tuple(states.shape[:3])} of the states without their last "
                f"axis, but has {tuple(mask.shape)}."
            )
        x = states.to(next(self.parameters()).dtype).masked_fill(~mask.bool().unsqueeze(-1), 0)
        if self.length_projection is not None:
            x = self.length_projection(x)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            # Reentrant checkpoints would lose the first layer's gradients, because the states need none.
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x
