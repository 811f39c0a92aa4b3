# SPDX-License-Identifier: Apache-2.0
"""The Fourier form of a convolution against PyTorch's own, and when it is taken."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from peft_dnd.decoders import plane_convolution
from peft_dnd.decoders.hyper_convolution import PlaneConvolution
from peft_dnd.decoders.plane_convolution import Tiling, choose_tiling, same_convolution


# At the sizes of the published settings: the first and a middle layer's, and the last prompt axis of the 7B one.
LARGE = [(384, 300, (384, 128), 9), (1024, 1024, (10, 200), 9), (2048, 4928, (18, 514), 11)]


def draw(in_channels: int, out_channels: int, plane: tuple[int, int], kernel_size: int, batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_channels, *plane, generator=generator)
    weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size, generator=generator)
    return x, weight / math.sqrt(in_channels * kernel_size**2), torch.randn(out_channels, generator=generator)


class Slices:
    """A weight that is no tensor, and notes what is read of it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.dtype, self.read = weight.shape, weight.dtype, []
        self._weight = weight

    def __getitem__(self, rows: slice) -> torch.Tensor:
        self.read.append(rows.stop - rows.start)
        return self._weight[rows].clone()


def use_tiling(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    def choose(in_channels, out_channels, plane, kernel_size, half):
        return Tiling(plane, tile, kernel_size, in_channels)

    monkeypatch.setattr(plane_convolution, "choose_tiling", choose)


@pytest.mark.parametrize("held", [10**9, 3000], ids=["one turn", "several turns"])
@pytest.mark.parametrize("tile", [(2, 2), (3, 5), (6, 4), (12, 21), (28, 28)], ids=str)
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "plane", "kernel_size"),
    [(3, 5, (12, 21), 3), (7, 4, (4, 30), 9), (2, 3, (30, 1), 5), (130, 70, (6, 9), 3), (1, 1, (3, 3), 11)],
)
@torch.no_grad()
def test_tiles_give_the_convolution(monkeypatch, in_channels, out_channels, plane, kernel_size, tile, held):
    use_tiling(monkeypatch, tile)
    monkeypatch.setattr(plane_convolution, "_HELD_INPUTS", held)
    x, weight, bias = draw(in_channels, out_channels, plane, kernel_size, batch=2)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=kernel_size // 2)
    found = same_convolution(x, weight, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_rounded_once(monkeypatch):
    use_tiling(monkeypatch, (5, 6))
    x, weight, bias = (tensor.bfloat16() for tensor in draw(40, 33, (10, 30), 9))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=4)
    found = same_convolution(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 1.01 * (exact.bfloat16().double() - exact).abs().max()


@torch.no_grad()
def test_defaults_around_it_change_nothing(monkeypatch):
    use_tiling(monkeypatch, (5, 7))
    x, weight, bias = draw(20, 30, (10, 40), 9)
    plane_convolution._transforms.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = same_convolution(x, weight, bias)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=4), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiled", [True, False])
def test_slices_give_the_bytes_of_the_whole(monkeypatch, tiled, dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in draw(130, 150, (10, 40), 9))
    if tiled:
        use_tiling(monkeypatch, (5, 6))
    slices = Slices(weight)
    assert torch.equal(same_convolution(x, slices, bias), same_convolution(x, weight, bias))
    assert sum(slices.read) == 150
    assert max(slices.read) <= plane_convolution.OUT_BLOCK


@torch.no_grad()
def test_batch_changes_no_byte(monkeypatch):
    use_tiling(monkeypatch, (5, 6))
    x, weight, bias = draw(20, 30, (10, 40), 9, batch=3)
    alone = torch.cat([same_convolution(one, weight, bias) for one in x.split(1)])
    assert torch.equal(same_convolution(x, weight, bias), alone)


@pytest.mark.parametrize(("in_channels", "out_channels", "plane", "kernel_size"), LARGE)
def test_fewer_operations_at_the_published_sizes(in_channels, out_channels, plane, kernel_size):
    tiling = choose_tiling(in_channels, out_channels, plane, kernel_size, False)
    plain = in_channels * out_channels * math.prod(plane) * kernel_size**2
    transforms = sum(
        count * 2 * tiling.products * (tiling.kernel_size + tiling.size[0])
        for count in (in_channels * out_channels, (in_channels + out_channels) * math.prod(tiling.grid))
    )
    products = in_channels * out_channels * math.prod(tiling.grid) * tiling.products
    assert products + transforms < plain / 3


def test_plain_convolution_where_it_is_as_cheap_or_wanted(monkeypatch):
    assert choose_tiling(10, 10, (2048, 130), 9, False) is None
    assert choose_tiling(4, 8, (12, 12), 3, False) is None
    assert choose_tiling(2048, 4296, (10, 130), 9, True) is None  # bfloat16 goes twice as fast
    use_tiling(monkeypatch, (5, 6))

    def refuse(*_):
        raise AssertionError("the Fourier form was taken")

    monkeypatch.setattr(plane_convolution, "_convolve_by_tiles", refuse)
    layer = PlaneConvolution(4, 6, (10, 12), 5)
    x = torch.randn(1, 4, 10, 12)
    layer(x).sum().backward()  # with gradients
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.double()(x.double())
        layer.float().to("meta")(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert PlaneConvolution(4, 6, (10, 12), 5)(x).dtype == torch.bfloat16
        with pytest.raises(AssertionError, match="Fourier"):
            PlaneConvolution(4, 6, (10, 12), 5)(x)
