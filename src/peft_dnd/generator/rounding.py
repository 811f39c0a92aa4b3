# SPDX-License-Identifier: Apache-2.0
"""By how much an adapter may differ when it is made again elsewhere: what rounding makes of it, found by trying.

Floating-point sums depend on their order, and the order on where a weight begins in memory, on the number of threads
and on the processor. A computed product with n terms is the exact one of factors that differ from the given ones by
about sqrt(n) u of themselves at most, u being the unit roundoff (Higham and Mary, 2019, SIAM J. Sci. Comput. 41(5)).
So the adapter is written a few times with every weight of the decoder and every output of the text encoder's layers
changed at random by that much (Monte Carlo arithmetic; Parker, 1997), and what then differs is what rounding can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


# How often it is written, and how far beyond the largest difference that this gave two honest adapters may lie apart:
# each of the two has its own rounding errors, and a few draws do not find the largest.
DRAWS = 3
MARGIN = 4.0
# Of products on a GPU, where TF32 keeps ten bits.
_TF32 = 2.0**-11
_FLOAT32 = torch.finfo(torch.float32).eps / 2


def rounding_tolerances(
    generator: Any, write: Callable[[], Mapping[str, Tensor]], made: Mapping[str, Tensor], *, on_cpu: bool = True
) -> dict[str, float]:
    """How far apart each tensor of an adapter may be when it is made again, as an absolute difference.

    Args:
        generator: The generator, a `PromptConditionedLoraGenerator` that holds its weights. They are as before after.
        write: Writes the adapter with it, key -> tensor.
        made: What `write` gives.
        on_cpu: Whether both were made on a CPU; on another device products may have ten bits.

    Returns:
        Key -> [`MARGIN`] times the largest difference that [`DRAWS`] draws gave.
    """
    draw = torch.Generator().manual_seed(0)
    found = dict.fromkeys(made, 0.0)
    for _ in range(DRAWS):
        with jittered(generator, draw, on_cpu=on_cpu):
            other = write()
        for key, tensor in made.items():
            found[key] = max(found[key], float((other[key].double() - tensor.double()).abs().max()))
    return {key: MARGIN * difference for key, difference in found.items()}


@contextmanager
def jittered(generator: Any, draw: torch.Generator, *, on_cpu: bool = True) -> Iterator[None]:
    """Within this context a generator computes as if its rounding errors were others.

    Args:
        generator: The generator.
        draw: Where chance comes from.
        on_cpu: See [`rounding_tolerances`].
    """
    with ExitStack() as stack:
        weights = [parameter for parameter in generator.decoder.parameters() if parameter.is_floating_point()]
        kept = [weight.detach().clone() for weight in weights]
        stack.callback(_put_back, weights, kept)
        for weight in weights:
            _jitter(weight, _terms(weight), draw, on_cpu=on_cpu)
        for layer in generator.text_encoder.module.modules():
            if next(layer.children(), None) is None:
                terms = max((_terms(parameter) for parameter in layer.parameters()), default=1)
                stack.callback(layer.register_forward_hook(_Jitter(terms, draw, on_cpu=on_cpu)).remove)
        yield


class _Jitter:
    """A hook that changes what a layer gives."""

    def __init__(self, terms: int, draw: torch.Generator, *, on_cpu: bool) -> None:
        self._terms, self._draw, self._on_cpu = terms, draw, on_cpu

    def __call__(self, layer: nn.Module, given: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        changed = output.detach().clone()
        _jitter(changed, self._terms, self._draw, on_cpu=self._on_cpu)
        return changed


@torch.no_grad()
def _jitter(tensor: Tensor, terms: int, draw: torch.Generator, *, on_cpu: bool) -> None:
    """Change each number by up to what rounding makes of a sum of so many terms, relative to itself."""
    # Narrow types are added up in float32 and rounded once.
    unit = max(_FLOAT32 * math.sqrt(terms), torch.finfo(tensor.dtype).eps / 2, 0.0 if on_cpu else _TF32)
    noise = 2 * torch.rand(tensor.shape, generator=draw) - 1
    tensor.copy_(tensor.float() * (1 + unit * noise.to(tensor.device)))


@torch.no_grad()
def _put_back(weights: list[nn.Parameter], kept: list[Tensor]) -> None:
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)


def _terms(weight: Tensor) -> int:
    """How many terms each number has that a weight gives: all but its first axis."""
    return max(1, weight[0].numel()) if weight.dim() > 1 else 1
