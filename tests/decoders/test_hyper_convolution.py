# SPDX-License-Identifier: Apache-2.0
"""The hyper-convolution decoder against a reference written from the formula, and the properties it promises."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from peft_dnd.decoders import DECODERS, HyperConvolutionDecoder, HyperConvolutionLayer, build_decoder, derive_cascade
from peft_dnd.decoders.hyper_convolution import PUBLISHED_PARAMETER_NAMES
from peft_dnd.errors import GeneratorConfigError


# The cascades of the published settings, their kernels, their lengths before projection, and what each then counts:
# the decoder alone, and with the two Linear layers (max_length -> L, L -> L) of the settings for long prompts.
PUBLISHED = {
    "common sense 0.5B": (
        [
            *[(128, 384, 384), (128, 200, 300), (128, 100, 256), (256, 50, 200), (512, 50, 200)],
            *[(1024, 25, 200), (1024, 10, 200), (2048, 10, 200), (4296, 10, 130)],
        ],
        (9, None, 1_113_203_220, 1_113_203_220),
    ),
    "math 1.5B": (
        [
            *[(32, 1000, 384), (64, 500, 300), (256, 500, 300), (512, 125, 300)],
            *[(1024, 64, 256), (2048, 32, 256), (4508, 18, 258)],
        ],
        (11, 4608, 1_775_333_308, 1_780_943_308),
    ),
    "coding 1.5B": (
        [
            *[(16, 1000, 384), (64, 500, 300), (256, 125, 300), (512, 64, 300)],
            *[(1024, 64, 256), (2048, 32, 256), (4508, 18, 258)],
        ],
        (11, 26624, 1_715_308_236, 1_742_934_236),
    ),
    "math 7B": (
        [
            *[(16, 1000, 384), (64, 500, 384), (256, 125, 400), (512, 64, 400)],
            *[(1024, 64, 400), (2048, 32, 400), (4928, 18, 514)],
        ],
        (11, 4608, 1_936_520_220, 1_942_130_220),
    ),
    "coding 7B": (
        [
            *[(16, 1000, 384), (64, 500, 384), (256, 125, 400), (512, 64, 400)],
            *[(1024, 64, 400), (2048, 32, 400), (4928, 18, 514)],
        ],
        (11, 26624, 1_936_520_220, 1_964_146_220),
    ),
    "multimodal 3B": (
        [(16, 1536, 384), (64, 500, 300), (256, 125, 300), (1024, 64, 300), (2048, 16, 256), (7308, 18, 258)],
        (11, None, 2_409_631_548, 2_409_631_548),
    ),
}

SMALL_CASCADE = [(3, 5, 4), (4, 4, 6), (4, 4, 6), (6, 2, 5)]


def mix_channels(x: torch.Tensor, weight: torch.Tensor, channels: int, plane: tuple[int, int]) -> torch.Tensor:
    """sum over taps (i, j) and input channels, by explicit loops; axes are named by their place in (B, N, L, C)."""
    out_channels, _, kernel_size, _ = weight.shape
    reach = kernel_size // 2
    x = x.movedim((channels, *plane), (1, 2, 3))
    _, _, height, width = x.shape
    out = x.new_zeros(x.shape[0], out_channels, height, width)
    for row, column in itertools.product(range(height), range(width)):
        for i, j in itertools.product(range(kernel_size), repeat=2):
            source_row, source_column = row + i - reach, column + j - reach
            if 0 <= source_row < height and 0 <= source_column < width:
                taps = torch.einsum("bi,oi->bo", x[:, :, source_row, source_column], weight[:, :, i, j])
                out[:, :, row, column] += taps
    return out.movedim((1, 2, 3), (channels, *plane))


def reference_layer(states: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula, on the published parameter names."""
    n, length, features = 1, 2, 3
    mean = states.mean(dim=(2, 3), keepdim=True)
    variance = ((states - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    x = (states - mean) / (variance + 1e-5) ** 0.5 * p["linear1.norm.weight"] + p["linear1.norm.bias"]
    w = mix_channels(x, p["linear1.conv1w.weight"], features, (length, n))
    w = mix_channels(w, p["linear1.conv1h.weight"], length, (n, features))
    h = mix_channels(x, p["linear1.conv2h.weight"], length, (n, features))
    h = torch.tanh(mix_channels(h, p["linear1.conv2w.weight"], features, (length, n)))
    y = (w + h + p["linear1.bias"]) / 3
    z = mix_channels(y, p["linear2.weight"], n, (length, features)) + p["linear2.bias"].view(1, -1, 1, 1)
    return states + z if z.shape == states.shape else z


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter, the zero ones too, away from its start; small enough that tanh is not saturated."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module


def small_decoder(**settings: object) -> HyperConvolutionDecoder:
    torch.manual_seed(0)
    settings = {"cascade": SMALL_CASCADE, "kernel_size": 3, "zero_init_output": False, **settings}
    return HyperConvolutionDecoder(SMALL_CASCADE[0], SMALL_CASCADE[-1], **settings)


def small_condition(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 3, 5, dtype=torch.bool)
    mask[0, 1, 3:] = False
    mask[-1, 2] = False
    return torch.randn(batch, 3, 5, 4, generator=generator), mask


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "kernel_size"),
    [((3, 5, 4), (6, 2, 7), 3), ((4, 3, 5), (4, 3, 5), 5), ((2, 3, 4), (5, 1, 1), 9), ((1, 1, 6), (2, 3, 2), 1)],
)
def test_layer_agrees_with_the_formula(in_shape, out_shape, kernel_size):
    torch.manual_seed(0)
    layer = randomised(HyperConvolutionLayer(in_shape, out_shape, kernel_size))
    published = {theirs: layer.get_parameter(ours).detach() for theirs, ours in PUBLISHED_PARAMETER_NAMES.items()}
    assert len(published) == len(layer.state_dict())
    states = torch.randn(2, *in_shape)
    out = layer(states)
    assert out.shape == (2, *out_shape)
    torch.testing.assert_close(out, reference_layer(states, published), rtol=1e-5, atol=1e-5)


def test_decoder_agrees_with_the_formula_layer_by_layer():
    decoder = randomised(small_decoder())
    states, mask = small_condition()
    expected = states * mask.unsqueeze(-1)
    for layer in decoder.layers:
        parameters = {theirs: layer.get_parameter(ours) for theirs, ours in PUBLISHED_PARAMETER_NAMES.items()}
        expected = reference_layer(expected, parameters)
    torch.testing.assert_close(decoder(states, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", PUBLISHED)
def test_published_parameter_counts(setting):
    cascade, (kernel_size, max_length, decoder_count, generator_count) = PUBLISHED[setting]
    with torch.device("meta"):
        decoder = HyperConvolutionDecoder(cascade[0], cascade[-1], cascade=cascade, kernel_size=kernel_size)
        derived = HyperConvolutionDecoder(cascade[0], cascade[-1], kernel_size=kernel_size)
        projections = []
        if max_length is not None:
            length = cascade[0][1]
            projections = [torch.nn.Linear(max_length, length), torch.nn.Linear(length, length)]
    count = sum(p.numel() for p in decoder.parameters())
    assert count == decoder_count
    assert count + sum(p.numel() for module in projections for p in module.parameters()) == generator_count
    assert not list(decoder.buffers())
    # What `derive_cascade` promises of itself.
    assert sum(p.numel() for p in derived.parameters()) <= 1.1 * decoder_count


def test_values_at_padding_do_not_matter():
    decoder = small_decoder().eval()
    states, mask = small_condition()
    expected = decoder(states, mask)
    for junk in (1e4, math.nan, math.inf):
        assert torch.equal(decoder(states.masked_fill(~mask.unsqueeze(-1), junk), mask), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert torch.equal(decoder(states, mask.to(dtype)), expected)
    assert not torch.equal(decoder(states + 0.1 * torch.randn_like(states), mask), expected)


def test_a_batch_wholly_masked_is_finite_with_finite_gradients():
    decoder = small_decoder()
    states, mask = small_condition()
    out = decoder(states, torch.zeros_like(mask))
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_residual_only_where_shapes_agree():
    decoder = small_decoder()
    assert [layer.residual for layer in decoder.layers] == [False, True, False]
    layer = HyperConvolutionLayer((4, 4, 6), (4, 4, 6), 3, zero_init_output=True)
    states = torch.randn(2, 4, 4, 6)
    assert torch.equal(layer(states), states)


@pytest.mark.parametrize("token_shape", [(6, 2, 5), (3, 5, 4)])
def test_unfitted_decoder_writes_the_mean_adapter(token_shape):
    decoder = HyperConvolutionDecoder((3, 5, 4), token_shape, kernel_size=3)
    out = decoder(*small_condition())
    assert out.shape == (2, *token_shape)
    assert torch.equal(out, torch.zeros_like(out))


def test_gradient_reaches_every_parameter():
    decoder = randomised(small_decoder())
    decoder(*small_condition()).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in decoder.parameters())


def test_a_zero_start_learns_and_then_every_parameter_moves():
    decoder = small_decoder(zero_init_output=True)
    start = copy.deepcopy(decoder.state_dict())
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    states, mask = small_condition()
    target = torch.randn(2, *SMALL_CASCADE[-1], generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(5):
        loss = (decoder(states, mask) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(value, start[name]) for name, value in decoder.state_dict().items())


def test_gradient_checkpointing_gives_equal_gradients(monkeypatch):
    decoder = randomised(small_decoder()).train()
    calls = []
    forward = HyperConvolutionLayer.forward
    monkeypatch.setattr(HyperConvolutionLayer, "forward", lambda self, x: calls.append(1) or forward(self, x))

    def gradients() -> list[torch.Tensor]:
        decoder.zero_grad()
        calls.clear()
        decoder(*small_condition()).square().sum().backward()
        return [parameter.grad.clone() for parameter in decoder.parameters()]

    plain = gradients()
    assert len(calls) == 3
    decoder.gradient_checkpointing = True
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert len(calls) == 6  # each layer once more in the backward pass


def test_bfloat16_and_autocast():
    decoder = randomised(small_decoder())
    states, mask = small_condition()
    expected = decoder(states, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(decoder(states, mask).float(), expected, rtol=0.1, atol=0.1)
    out = decoder.bfloat16()(states, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()


def scaled_down(cascade: list[tuple[int, int, int]], by: int) -> list[tuple[int, int, int]]:
    return [tuple(max(1, math.ceil(size / by)) for size in shape) for shape in cascade]


@pytest.mark.parametrize(
    ("cascade", "kernel_size"),
    [
        (scaled_down(PUBLISHED["common sense 0.5B"][0], 12), 9),
        (derive_cascade((8, 16, 48), (24, 4, 16)), 9),
        (derive_cascade((8, 16, 48), (24, 4, 16)), 3),
    ],
)
def test_initial_activations_keep_their_scale(cascade, kernel_size):
    torch.manual_seed(0)
    decoder = HyperConvolutionDecoder(
        cascade[0], cascade[-1], cascade=cascade, kernel_size=kernel_size, zero_init_output=False
    )
    measured = []

    def record(_: torch.nn.Module, __: object, out: torch.Tensor) -> None:
        measured.append(out.std().item())

    for layer in decoder.layers:
        layer.register_forward_hook(record)
        for name, module in layer.named_children():
            if name not in ("norm", "prompt_axis"):
                module.register_forward_hook(record)
    with torch.no_grad():
        decoder(torch.randn(2, *cascade[0]), torch.ones(2, *cascade[0][:2]))
    assert len(measured) == 5 * len(decoder.layers)
    assert min(measured) > 0.7
    assert max(measured) < 1.4


def test_modules_initialise_themselves_after_the_meta_device():
    torch.manual_seed(0)
    built = small_decoder(zero_init_output=True)
    with torch.device("meta"):
        decoder = small_decoder(zero_init_output=True)
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        parameter.data.fill_(math.nan)
    torch.manual_seed(0)
    for module in decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), built.parameters(), strict=True))
    assert torch.equal(decoder(*small_condition()), torch.zeros(2, *SMALL_CASCADE[-1]))


SHAPES = [(1, 1, 1), (1, 24, 384), (8, 24, 384), (128, 384, 384), (7, 513, 3584), (60, 4, 64), (4296, 10, 130)]


@pytest.mark.parametrize("num_layers", [None, 1, 5, 20])
def test_derived_cascade_never_turns_back(num_layers):
    for first, last in [*itertools.product(SHAPES, SHAPES), ((16, 1000, 384), (99991, 18, 514))]:
        cascade = derive_cascade(first, last, num_layers)
        assert (cascade[0], cascade[-1]) == (first, last)
        assert len(cascade) - 1 == num_layers if num_layers else 2 <= len(cascade) - 1 <= 8
        for limit, *axis in zip((2048, 256, 256), *cascade, strict=True):
            assert axis in (sorted(axis), sorted(axis, reverse=True))
            assert max(axis[1:-1], default=0) <= max(limit, min(axis[0], axis[-1]))


def test_derived_cascade_about_doubles_the_prompts():
    cascade = derive_cascade((32, 48, 384), (1500, 8, 128))
    factors = [after[0] / before[0] for before, after in itertools.pairwise(cascade)]
    assert all(1.6 < factor < 2.5 for factor in factors)


@pytest.mark.parametrize("kernel_size", [0, 2, 8, -3, 3.0, True, None])
def test_impossible_kernels_are_refused(kernel_size):
    with pytest.raises(GeneratorConfigError, match="kernel_size must be a positive odd integer"):
        small_decoder(kernel_size=kernel_size)


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        ([(3, 5, 5), (6, 2, 5)], r"must begin with the condition's shape \(3, 5, 4\), but begins with \(3, 5, 5\)"),
        ([(3, 5, 4), (6, 2, 4)], r"must end with the shape of the token grid \(6, 2, 5\), but ends with \(6, 2, 4\)"),
        ([(3, 5, 4)], "at least two shapes"),
        ([], "at least two shapes"),
        ([(3, 5, 4), (4, 0, 4), (6, 2, 5)], r"cascade\[1\] must be three positive integers"),
        ([(3, 5, 4), (4, 4), (6, 2, 5)], r"cascade\[1\] must be three positive integers"),
        (7, "cascade must be a list of shapes"),
    ],
)
def test_impossible_cascades_are_refused(cascade, message):
    with pytest.raises(GeneratorConfigError, match=message):
        small_decoder(cascade=cascade)


def test_impossible_shapes_are_refused():
    with pytest.raises(GeneratorConfigError, match="condition_shape must be three positive integers"):
        HyperConvolutionDecoder((3, 5), (6, 2, 5))
    with pytest.raises(GeneratorConfigError, match="token_shape must be three positive integers"):
        HyperConvolutionDecoder((3, 5, 4), (6, 2, 0.5))
    with pytest.raises(GeneratorConfigError, match="num_layers must be a positive integer"):
        derive_cascade((3, 5, 4), (6, 2, 5), 0)
    with pytest.raises(GeneratorConfigError, match="residual needs equal shapes"):
        HyperConvolutionLayer((3, 5, 4), (6, 2, 5), 3, residual=True)


def test_conditions_of_other_shapes_are_refused():
    decoder = small_decoder()
    states, mask = small_condition()
    with pytest.raises(GeneratorConfigError, match=r"\(N, L, C\) = \(3, 5, 4\), but have \(2, 3, 4, 4\)"):
        decoder(states[:, :, :4], mask[:, :, :4])
    with pytest.raises(GeneratorConfigError, match="mask must have the shape"):
        decoder(states, mask[:1])


def test_build_decoder():
    settings = {"kernel_size": 3, "cascade": [list(shape) for shape in SMALL_CASCADE]}
    decoder = build_decoder("hyper_convolution", (3, 5, 4), (6, 2, 5), settings)
    assert type(decoder) is DECODERS["hyper_convolution"]
    assert decoder.cascade == tuple(SMALL_CASCADE)
    with pytest.raises(GeneratorConfigError, match=r"Unknown decoder_type 'mlp'. Known: 'core', 'hyper_convolution'"):
        build_decoder("mlp", (3, 5, 4), (6, 2, 5), {})
    with pytest.raises(GeneratorConfigError, match=r"no setting 'kernel'. Its settings: 'cascade', 'kernel_size'"):
        build_decoder("hyper_convolution", (3, 5, 4), (6, 2, 5), {"kernel": 3})
