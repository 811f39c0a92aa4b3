# SPDX-License-Identifier: Apache-2.0
"""Adapters that differ in form but not in meaning, brought to one layout: other alphas, other ranks, fewer modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import GeneratorConfigError, LayoutError
from .factors import canonical_factors
from .layout import AdapterLayout, LoraModule, LoraTensor


_ROUNDING = 1e-12


@dataclass(frozen=True)
class Conversion:
    """What became of an adapter that was brought to another layout.

    Attributes:
        ranks: Its own ranks, each once, in rising order.
        scalings: Its own scalings, alpha / r or alpha / sqrt(r), each once, in rising order.
        zero_modules: The modules that it lacks and got zeros for.
        lost_share: The share of its update, by squared Frobenius norm, that the layout's rank, or the shared A, could
            not hold; 0 to 1.
        lost_most: The module that lost the largest share of its own update; `None` if nothing was lost.
        lost_share_there: That share.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    zero_modules: tuple[str, ...] = ()
    lost_share: float = 0.0
    lost_most: str | None = None
    lost_share_there: float = 0.0


def common_layout(layouts: Mapping[str, AdapterLayout], rank: int | None = None) -> AdapterLayout:
    """The layout to which adapters can be brought that differ in alpha, in rank and in which modules they have.

    It has the modules of all of them, one rank, and alpha = r without rsLoRA, so that the scaling is 1 and B takes up
    each adapter's own.

    Args:
        layouts: Name -> the layout of each adapter, at least one.
        rank: The rank; by default the largest of any module of any adapter, at which nothing is lost.

    Raises:
        LayoutError: If a module has other sizes in one adapter than in another, or goes by two names.
        GeneratorConfigError: If the rank is not positive.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise GeneratorConfigError(f"rank must be a whole number, at least 1, got {rank!r}.")
    rank = rank or max(layout.max_rank for layout in layouts.values())
    found: dict[str, tuple[str, LoraModule]] = {}
    for source, layout in layouts.items():
        for module in layout.modules:
            first_source, first = found.setdefault(module.name, (source, module))
            if _form(first) != _form(module):
                raise LayoutError(
                    f"Module {module.name!r} is of {_in_words(first)} in {first_source} and of {_in_words(module)} in "
                    f"{source}: they are adapters of different base models. Import those of one base at a time."
                )
    _check_names(found)
    modules = tuple(
        LoraModule(
            name, module.kind, (rank, *module.shape_a[1:]), (module.shape_b[0], rank, *module.shape_b[2:]), rank
        )
        for name, (_, module) in found.items()
    )
    return AdapterLayout(
        modules=modules,
        target_modules=_shared_targets([layout.target_modules for layout in layouts.values()]),
        fan_in_fan_out=any(layout.fan_in_fan_out for layout in layouts.values()),
        task_type=_shared("task_type", {source: layout.task_type for source, layout in layouts.items()}),
        base_model_name_or_path=next(
            (layout.base_model_name_or_path for layout in layouts.values() if layout.base_model_name_or_path), None
        ),
    )


def convert_adapter(
    state_dict: Mapping[str, torch.Tensor],
    layout: AdapterLayout,
    target: AdapterLayout,
    *,
    canonical: bool = True,
    shared: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], Conversion]:
    """Bring an adapter to another layout: the same update ΔW = s B A, but for what a smaller rank cannot hold.

    The scaling goes into B, which is exact but for the rounding of the result to float32, and exact altogether where
    the two scalings are a power of two apart. A smaller rank is filled up with zeros, a larger one cut to the update's
    largest singular values, which is the nearest update of that rank. Modules that the adapter lacks become zeros.

    Args:
        state_dict: The adapter, PEFT's on-disk key -> tensor, of its own layout.
        layout: Its own layout.
        target: The other.
        canonical: Whether all factors become canonical, as [`canonical_factors`] makes them, or only those that are
            cut.
        shared: A's on-disk key -> the A that all adapters are to have, instead, as
            [`SharedInputs`][peft_dnd.adapters.shared_factors.SharedInputs] finds it. B becomes what comes nearest to
            the update with it.

    Returns:
        The adapter in float32, of the target's layout and in its order; and what became of it.

    Raises:
        LayoutError: If it has a module that the target has not, or one of other sizes.
    """
    own = {module.name: module for module in layout.modules}
    wanted = {module.name: module for module in target.modules}
    for name, module in own.items():
        if name not in wanted or _form(wanted[name]) != _form(module):
            there = f"is of {_in_words(wanted[name])}" if name in wanted else "is not"
            raise LayoutError(
                f"Module {name!r}, of {_in_words(module)} in the adapter, {there} in the layout that it is to be "
                "brought to. Use the layout of adapters of the same base that adapts as many modules."
            )
    converted: dict[str, torch.Tensor] = {}
    whole, lost = 0.0, 0.0
    worst: tuple[float, str | None] = (0.0, None)
    for name, module in wanted.items():
        given = None if shared is None else shared[module.tensors[0].key].double().reshape(module.rank, -1)
        if name not in own:
            converted.update({tensor.key: torch.zeros(tensor.shape, dtype=torch.float32) for tensor in module.tensors})
            if shared is not None:
                converted[module.tensors[0].key] = shared[module.tensors[0].key].float()
            continue
        a, b = (_matrix(tensor, state_dict) for tensor in own[name].tensors)
        b = b * (layout.scaling(own[name]) / target.scaling(module))
        size = _squared_norm(a, b)
        a, b = _of_rank(a, b, module.rank, canonical=canonical) if given is None else _with_shared(a, b, given)
        # What is cut is orthogonal to what is kept, so that their squares add up.
        exact = given is None and own[name].rank <= module.rank
        cut = 0.0 if exact else size - _squared_norm(a, b)
        cut = cut if cut > _ROUNDING * size else 0.0
        size, cut = size * target.scaling(module) ** 2, cut * target.scaling(module) ** 2
        whole, lost = whole + size, lost + cut
        worst = max(worst, (cut / size if size else 0.0, name), key=lambda share: share[0])
        for tensor, matrix in zip(module.tensors, (a, b), strict=True):
            converted[tensor.key] = matrix.float().reshape(tensor.shape).contiguous()
    conversion = Conversion(
        ranks=tuple(sorted({module.rank for module in layout.modules})),
        scalings=tuple(sorted({layout.scaling(module) for module in layout.modules})),
        zero_modules=tuple(name for name in wanted if name not in own),
        lost_share=lost / whole if whole else 0.0,
        lost_most=worst[1],
        lost_share_there=worst[0],
    )
    return converted, conversion


def _of_rank(a: torch.Tensor, b: torch.Tensor, rank: int, *, canonical: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of another rank."""
    if canonical or a.shape[0] > rank:
        a, b = canonical_factors(a, b)
    a, b = a[:rank], b[:, :rank]
    missing = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _with_shared(a: torch.Tensor, b: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors with a given A whose update comes nearest to B A: B' = B A A'⁺."""
    return shared, b @ (a @ torch.linalg.pinv(shared))


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """||B A||² = <Bᵀ B, A Aᵀ>: the update is never formed."""
    return ((b.mT @ b) * (a @ a.mT)).sum().item()


def _matrix(tensor: LoraTensor, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
    matrix = tensor.find_in(state_dict).double()
    return matrix.reshape((tensor.rank, -1) if tensor.side == "A" else (-1, tensor.rank))


def _form(module: LoraModule) -> tuple[Any, ...]:
    """All of a module but its rank and alpha."""
    return module.kind, module.shape_a[1:], module.shape_b[:1] + module.shape_b[2:]


def _in_words(module: LoraModule) -> str:
    kind, into, out = _form(module)
    return (
        f"kind {kind} with A (r, {', '.join(map(str, into))}) and B ({', '.join(map(str, (out[0], 'r', *out[1:])))})"
    )


def _check_names(found: Mapping[str, tuple[str, LoraModule]]) -> None:
    """Refuse modules that are one module under two names, as a bare model's and that of one with a head are."""
    for name, (source, _) in found.items():
        parts = name.split(".")
        for start in range(1, len(parts)):
            other = found.get(".".join(parts[start:]))
            if other is not None:
                raise LayoutError(
                    f"{source} calls a module {name!r} that {other[0]} calls {'.'.join(parts[start:])!r}: one was "
                    "trained on a bare model, or on one with another head. Save both from models of one class."
                )


def _shared_targets(targets: Collection[tuple[str, ...] | str | None]) -> tuple[str, ...] | str | None:
    """What targets just the modules of all: the suffixes of all of them; full names where some have a pattern."""
    if len(set(targets)) == 1:
        return next(iter(targets))
    suffixes: set[str] = set()
    for target in targets:
        if not isinstance(target, tuple):
            return None
        suffixes.update(target)
    return tuple(sorted(suffixes))


def _shared(what: str, values: Mapping[str, Any]) -> Any:
    """The one value that all have that have any."""
    given = {source: value for source, value in values.items() if value is not None}
    for source, value in given.items():
        first_source, first = next(iter(given.items()))
        if value != first:
            raise LayoutError(
                f"{first_source} has {what} {first!r} and {source} has {value!r}. A generator writes adapters of one "
                "kind: import those of each by themselves."
            )
    return next(iter(given.values()), None)
