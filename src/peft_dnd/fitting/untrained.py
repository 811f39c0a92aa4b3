# SPDX-License-Identifier: Apache-2.0
"""Where a generator starts when there are no adapters to start from: its mean and scales, taken of the base itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.layout import AdapterLayout
from ..adapters.matching import match_modules
from ..adapters.tokenizer import WeightTokenizer


_NOT_READ = ("labels", "top_tokens", "top_log_probs")

Sizes = Mapping[str, tuple[float, float]]
"""Name of an adapted module in the layout -> root mean square of what goes into it, and of what comes out."""


def untrained_statistics(
    tokenizer: WeightTokenizer, initial: Mapping[str, torch.Tensor], sizes: Sizes | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scale for [`WeightNormalization.set_statistics`] where there are no adapters to take them from.

    The mean is the adapter that the base brings along, so that an unfitted generator writes just that one; it must not
    be zero in both A and B, where the loss has no gradient.

    The scale of A is 1 / sqrt(3 n), n its long side: the standard deviation of PEFT's own initialisation. The scale of
    B is that at which the update's output is as large as the module's own,

        scale = size of the output / (sqrt(r) * alpha / r * size of the input * length of A's rows),

    so that one step of an optimiser which moves all numbers alike turns every module by a like share, though what goes
    through them differs in size by a factor of hundreds. Of modules whose sizes are not known it is like A's.

    Args:
        tokenizer: The tokenizer.
        initial: PEFT on-disk key -> matrix.
        sizes: What goes through the modules; see [`activation_sizes`].

    Returns:
        Float32 mean of shape `grid_shape`, and float32 scale of shape (N_w,).
    """
    layout = tokenizer.layout
    layout.check_plain_lora("A start without checkpoints")
    scales = []
    for module in layout.modules:
        a, b = module.tensors
        scales.append((3.0 * a.long_size) ** -0.5)
        known = (sizes or {}).get(module.name)
        if known is None or min(known) == 0:
            scales.append((3.0 * b.long_size) ** -0.5)
            continue
        rows = initial[a.key].flatten(1).float().norm(dim=1).square().mean().sqrt().item()
        scaling = layout.scaling(module)
        scales.append(known[1] / (module.rank**0.5 * scaling * known[0] * rows))
    return tokenizer.encode(initial), torch.tensor(scales, dtype=torch.float32)[tokenizer.tensor_index()]


@torch.no_grad()
def activation_sizes(model: nn.Module, layout: AdapterLayout, batches: Sequence[Mapping[str, Any]]) -> Sizes:
    """How large what goes into each adapted module of a base, and what comes out of it, is on a few batches.

    It is the median over the positions of the root mean square over the features: the first position of language
    models is often hundreds of times as large as all others.

    Args:
        model: The base, with or without adapters.
        layout: The layout, which names the modules.
        batches: Keyword arguments of the base's forward.

    Returns:
        The sizes; modules that read no floating-point features, embeddings for one, are left out.
    """
    names = match_modules(model, layout)
    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in names}
    with _watched({name: model.get_submodule(inside) for name, inside in names.items()}, seen):
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name not in _NOT_READ})
    return {
        name: (torch.cat(into).median().item(), torch.cat(out).median().item())
        for name, (into, out) in seen.items()
        if into
    }


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], seen: Mapping[str, tuple[list[torch.Tensor], list[torch.Tensor]]]
) -> Iterator[None]:
    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].is_floating_point():
            for found, tensor in zip(seen[name], (inputs[0], output), strict=True):
                found.append(tensor.float().square().mean(-1).sqrt().flatten().cpu())

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
