# SPDX-License-Identifier: Apache-2.0
"""Distances between the updates of adapters, ||B₁ A₁ - B₂ A₂||, which are never formed; and canonical factors.

The factors of an update ΔW = s B A are not determined by it: (B G)(G^-1 A) is the same update for every invertible G.
So adapters are compared by ΔW, with products of r x r matrices alone, or their factors are first brought into one
canonical form.

Matrices are seen as in PEFT's files: A with the rank first, (r, n), and B with the rank second, (m, r); further axes
of convolutions count as part of n, and leading axes, written (...), as a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from .layout import AdapterLayout, LoraModule


Matrices = Mapping[str, torch.Tensor]
"""PEFT on-disk key -> matrix of the layout's shape, behind one leading batch axis or none."""


def delta_weight_distance(
    a: torch.Tensor, b: torch.Tensor, other_a: torch.Tensor, other_b: torch.Tensor
) -> torch.Tensor:
    """The squared Frobenius distance of two updates, ||B A - B' A'||², from r x r products alone.

    With dA = A - A', dB = B - B' and the means Ā = (A + A') / 2, B̄ = (B + B') / 2 the difference is dB Ā + B̄ dA, so

        ||B A - B' A'||² = <dBᵀ dB, Ā Āᵀ> + 2 <dBᵀ B̄, Ā dAᵀ> + <B̄ᵀ B̄, dA dAᵀ>

    where <., .> is the sum of products, entry by entry. Unlike tr(AᵀBᵀBA) - 2 tr(AᵀBᵀB'A') + tr(A'ᵀB'ᵀB'A'), whose
    float32 rounding of about 1e-7 ||BA||² drowns any smaller distance, its terms shrink as the factors come together,
    and it is exactly zero where they are equal. It loses precision only where factors are far apart and updates are
    not (one update in two gauges): rounding is then about 1e-7 of ||dB Ā||² + ||B̄ dA||², and may come out below zero.

    Args:
        a: (..., r, n), any floating dtype; the arithmetic is float32 at least.
        b: (..., m, r).
        other_a: As `a`, of any rank r'; where r' differs the smaller one is filled up with zeros.
        other_b: As `b`.

    Returns:
        (...), float32 or float64.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, other_a.dtype), torch.float32)
    a, b, other_a, other_b = (matrix.to(dtype) for matrix in (a, b, other_a, other_b))
    rank = max(a.shape[-2], other_a.shape[-2])
    a, other_a = (_fill(matrix, -2, rank) for matrix in (a, other_a))
    b, other_b = (_fill(matrix, -1, rank) for matrix in (b, other_b))
    change_a, change_b = a - other_a, b - other_b
    mean_a, mean_b = (a + other_a) / 2, (b + other_b) / 2
    squares = (change_b.mT @ change_b) * (mean_a @ mean_a.mT)
    squares = squares + 2 * (change_b.mT @ mean_b) * (mean_a @ change_a.mT)
    squares = squares + (mean_b.mT @ mean_b) * (change_a @ change_a.mT)
    return squares.sum((-2, -1))


def delta_weight_distances(predicted: Matrices, target: Matrices, layout: AdapterLayout) -> torch.Tensor:
    """The squared distance of two adapters' updates, module by module: s² ||B A - B' A'||², s the module's scaling.

    Modules of one form are handled in one go, so that even a deep model takes a handful of batched products.

    Args:
        predicted: Matrices of the layout.
        target: Matrices of the layout, with the same batch axis or none.
        layout: The layout.

    Returns:
        (..., M), float32 or float64, in the layout's order of its M modules.

    Raises:
        LayoutError: If a matrix is missing or has another shape.
    """
    places, found = [], []
    for numbers, modules in _alike(layout):
        factors = [_stack(matrices, modules, side) for matrices in (predicted, target) for side in (0, 1)]
        scaling = torch.tensor([layout.scaling(module) for module in modules], device=factors[0].device)
        found.append(delta_weight_distance(*factors) * scaling.square())
        places.extend(numbers)
    order = torch.tensor(places).argsort().to(found[0].device)
    return torch.cat(found, -1)[..., order]


def delta_weight_mse(
    predicted: Matrices, target: Matrices, layout: AdapterLayout, module_size: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of ΔW = s B A, the mean over modules and batch; ΔW is never formed.

    Args:
        predicted: Matrices of the layout.
        target: The same.
        layout: The layout.
        module_size: (M,), positive: what each module's squared distance is divided by, such as the mean squared
            distance of the training adapters from their mean, so that modules as unlike in size as the layers of a
            deep model weigh alike. By default the number of entries of ΔW.

    Returns:
        A scalar, float32 or float64.

    Raises:
        LayoutError: If a matrix is missing or has another shape.
    """
    distances = delta_weight_distances(predicted, target, layout)
    if module_size is None:
        entries = [a.long_size * b.long_size for a, b in (module.tensors for module in layout.modules)]
        module_size = torch.tensor(entries, dtype=torch.float64)
    return (distances / module_size.to(distances)).mean()


def canonical_factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical factors of the update B A: the same for every pair of factors of that update, and the same update.

    QR of B and of Aᵀ, singular value decomposition U S Vᵀ of the r x r core between them, and S divided evenly: the
    columns of B and the rows of A become orthogonal, in falling order of their norms, which are equal in both, the
    roots of the update's singular values. Of each column of B the entry of the largest magnitude is positive. What is
    left open are updates with equal singular values, of which each rotation is as good. Where the update has a smaller
    rank than r the rest is zero. Arithmetic is float64.

    Args:
        a: (..., r, n).
        b: (..., m, r).

    Returns:
        A and B, of the same shapes and dtypes.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    # What is zero but for rounding would come out 1e-8 of the largest under the root.
    root = torch.where(s > s[..., :1] * max(a.shape[-1], b.shape[-2]) * torch.finfo(s.dtype).eps, s, 0.0).sqrt()
    left, right = (q_b @ u) * root[..., None, :], root[..., :, None] * (vt @ q_a.mT)
    largest = left.gather(-2, left.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    rank = a.shape[-2]
    return _fill(right * sign.mT, -2, rank).to(a.dtype), _fill(left * sign, -1, rank).to(b.dtype)


def canonical_state_dict(layout: AdapterLayout, state_dict: Matrices) -> dict[str, torch.Tensor]:
    """An adapter with each module's factors in canonical form; see [`canonical_factors`].

    Args:
        layout: The layout.
        state_dict: Matrices of the layout.

    Returns:
        Matrices of the layout, in its order, that give the same updates up to rounding.

    Raises:
        LayoutError: If a matrix is missing or has another shape.
    """
    done: dict[str, torch.Tensor] = {}
    for _, modules in _alike(layout):
        a, b = canonical_factors(*(_stack(state_dict, modules, side) for side in (0, 1)))
        for side, stacked in enumerate((a, b)):
            for module, matrix in zip(modules, stacked.unbind(-3), strict=True):
                tensor = module.tensors[side]
                done[tensor.key] = matrix.reshape(*matrix.shape[:-2], *tensor.shape).contiguous()
    return {tensor.key: done[tensor.key] for tensor in layout.tensors}


def interpolated_adapter(
    layout: AdapterLayout, first: Matrices, second: Matrices, share: float, *, canonical: bool = False
) -> dict[str, torch.Tensor]:
    """An adapter for the update that lies between those of two others: λ B A + (1 - λ) B' A', of the layout's rank.

    What an adapter does is its update, so that is what is interpolated, not its factors: the product of interpolated
    factors has cross terms B A' and B' A, which belong to neither. The interpolated update has up to twice the rank.
    Of it is kept

    - by default what the row space of the interpolated Ā = λ A + (1 - λ) A' holds, B̄ = (λ B A + (1 - λ) B' A') Ā⁺:
      factors that lie where those of the two adapters do, as targets must that are compared entry by entry. Where A is
      the same nothing is lost, and B̄ = λ B + (1 - λ) B'. Adapters from one common initialisation come near to that.
    - `canonical`: the best approximation of the rank (Eckart and Young), in [`canonical_factors`].

    Args:
        layout: The layout.
        first: Matrices of the layout, of which λ is the share.
        second: Matrices of the layout.
        share: λ, from 0 to 1.
        canonical: Which of the two.

    Returns:
        Matrices of the layout, in its order and in the dtypes of `first`. Arithmetic is float64.

    Raises:
        LayoutError: If a matrix is missing or has another shape.
    """
    done: dict[str, torch.Tensor] = {}
    shares = (share, 1 - share)
    for _, modules in _alike(layout):
        a = [_stack(matrices, modules, 0).double() for matrices in (first, second)]
        b = [
            _stack(matrices, modules, 1).double() * part
            for matrices, part in zip((first, second), shares, strict=True)
        ]
        if canonical:
            rank = a[0].shape[-2]
            whole_a, whole_b = canonical_factors(torch.cat(a, -2), torch.cat(b, -1))
            mixed = (whole_a[..., :rank, :], whole_b[..., :rank])
        else:
            mean = shares[0] * a[0] + shares[1] * a[1]
            back = mean.mT @ torch.linalg.pinv(mean @ mean.mT, hermitian=True)
            mixed = (mean, b[0] @ (a[0] @ back) + b[1] @ (a[1] @ back))
        for side, stacked in enumerate(mixed):
            for module, matrix in zip(modules, stacked.unbind(-3), strict=True):
                tensor = module.tensors[side]
                kept = matrix.reshape(*matrix.shape[:-2], *tensor.shape)
                done[tensor.key] = kept.to(first[tensor.key].dtype).contiguous()
    return {tensor.key: done[tensor.key] for tensor in layout.tensors}


def _alike(layout: AdapterLayout) -> Iterator[tuple[list[int], list[LoraModule]]]:
    """The modules in groups of one form, each with its place in the layout."""
    layout.check_plain_lora("An update B A, and its canonical factors,")
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for number, module in enumerate(layout.modules):
        groups.setdefault((module.shape_a, module.shape_b), []).append(number)
    for numbers in groups.values():
        yield numbers, [layout.modules[number] for number in numbers]


def _stack(matrices: Matrices, modules: list[LoraModule], side: int) -> torch.Tensor:
    """A (side 0) or B (side 1) of modules of one form: (..., modules, r, n) or (..., modules, m, r)."""
    flattened = []
    for tensor in (module.tensors[side] for module in modules):
        matrix = tensor.find_in(matrices, batched=True)
        batch = matrix.shape[: -len(tensor.shape)]
        flattened.append(matrix.reshape(*batch, *((tensor.rank, -1) if side == 0 else (-1, tensor.rank))))
    return torch.stack(flattened, -3)


def _fill(matrix: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Zeros behind a matrix along its last axis (-1) or the one before (-2), up to a size."""
    missing = size - matrix.shape[axis]
    if missing == 0:
        return matrix
    return F.pad(matrix, (0, missing) if axis == -1 else (0, 0, 0, missing))
