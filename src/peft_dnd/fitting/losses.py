# SPDX-License-Identifier: Apache-2.0
"""What a decoder is fitted by: pure functions on grids of weight tokens.

A grid has the shape (N_w, L_w, C_w): weight tokens, rows, columns. Its valid mask, of the same shape, is `True` where
an entry stands for a weight and `False` where it only fills up a token.
"""

from __future__ import annotations

import math

import torch

from ..errors import GeneratorConfigError, LayoutError, WeightValueError


def masked_mse(
    predicted: torch.Tensor,
    target: torch.Tensor,
    valid_mask: torch.Tensor,
    token_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The paper's weighted mean squared error (arXiv 2506.16406), over valid entries.

        loss = sum_{b, e valid} w_{t(e)} (predicted_{b, e} - target_{b, e})^2  /  (B * sum_{e valid} w_{t(e)})

    with `t(e)` the token of entry `e`: the mean of the squared error times weights that are scaled to a mean of 1 over
    the valid entries. So weights of any scale give losses that compare, and without weights it is the plain mean.

    Args:
        predicted: (B, N_w, L_w, C_w), any floating dtype; the arithmetic is float32 at least.
        target: same shape. What stands at invalid entries, NaN included, has no effect on the loss or its gradients.
        valid_mask: (N_w, L_w, C_w) bool, the same for the whole batch.
        token_weight: (N_w,) finite and not negative, such as `TokenSpread.weights` gives. `None`: all alike.

    Returns:
        A scalar, float32 (float64 where `predicted` or `target` is).

    Raises:
        LayoutError: the shapes do not belong together.
        WeightValueError: no entry is valid, or the weights are negative, not finite, or zero for every valid entry.
    """
    if predicted.dim() != 4 or predicted.shape != target.shape or predicted.shape[1:] != valid_mask.shape:
        raise LayoutError(
            "Predicted and target tokens must share the shape (batch, N_w, L_w, C_w) and the valid mask must be "
            f"(N_w, L_w, C_w), but they have {tuple(predicted.shape)}, {tuple(target.shape)} and "
            f"{tuple(valid_mask.shape)}. Both sides must come from the same adapter layout and chunk width."
        )
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    # Filled before the difference is taken: a NaN that is only masked afterwards would still poison the gradient.
    invalid = ~valid_mask
    error = predicted.to(dtype).masked_fill(invalid, 0) - target.to(dtype).masked_fill(invalid, 0)
    squares = error.square().sum(dim=(0, 2, 3))
    weight = _checked_token_weight(token_weight, valid_mask, dtype)
    entries = valid_mask.sum(dim=(1, 2)).to(dtype)
    return (weight * squares).sum() / (predicted.shape[0] * (weight * entries).sum())


def _checked_token_weight(
    token_weight: torch.Tensor | None, valid_mask: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    num_tokens = valid_mask.shape[0]
    if not valid_mask.any():
        raise WeightValueError("The valid mask marks no entry as a weight, so there is nothing to take a mean over.")
    if token_weight is None:
        return torch.ones(num_tokens, dtype=dtype, device=valid_mask.device)
    if token_weight.shape != (num_tokens,):
        raise LayoutError(f"token_weight must have the shape ({num_tokens},), but has {tuple(token_weight.shape)}.")
    weight = token_weight.to(dtype)
    of_valid_tokens = weight[valid_mask.flatten(1).any(dim=1)]
    if not (weight.isfinite().all() and (weight >= 0).all() and of_valid_tokens.any()):
        raise WeightValueError(
            "Token weights must be finite, not negative, and above zero for at least one token that holds weights, "
            f"but run from {weight.min().item()} to {weight.max().item()}. Set a floor, or use no weights."
        )
    return weight


def add_noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
    """Adds Gaussian noise. The paper's code adds it to the condition states (1e-4) and to the target tokens (1e-5).

    Args:
        tensor: any floating dtype; returned as it is, and no number drawn, where `std` is 0. Noise far below the
            tensor's resolution is lost: 1e-5 on a bf16 token of size 1 rounds away.
        std: standard deviation, in the tensor's own units.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        GeneratorConfigError: `std` is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0):
        raise GeneratorConfigError(f"The standard deviation of noise must be finite and not negative, but is {std!r}.")
    if std == 0:
        return tensor
    noise = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.add(tensor, noise, alpha=std)
