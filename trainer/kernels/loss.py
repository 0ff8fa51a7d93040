"""The weighted squared error of a batch in parts, with the gradient for the prediction in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.dispatch import kernels_for

MAX_PARTS = 2
Weights = Sequence[float] | Tensor


def weighted_squared_error(prediction: Tensor, targets: Sequence[Tensor], weights: Weights) -> tuple[Tensor, Tensor]:
    """sum over parts of the mean over the part of `weight * (prediction - target)^2`, in fp32.

    The prediction's first rows belong to the first part, the next ones to the second: targets are not concatenated.
    The gradient for the prediction is worked out together with the loss, and only scaled when it is asked for; it can
    be asked for once. One Triton kernel and a small one to sum up on CUDA, in an order that the shapes alone decide;
    PyTorch elsewhere.

    Args:
        prediction: (B, C, H, W), any floating type.
        targets: one or two of (B_p, C, H, W) with the sum of B_p equal to B, any floating type, the same for both.
        weights: one number for each part, or fp32 (B,) for each sample; no gradient flows to them.

    Returns:
        The loss, a scalar, and each part's mean squared error without weights (parts,), without gradient; fp32.
    """
    assert 1 <= len(targets) <= MAX_PARTS and sum(map(len, targets)) == len(prediction) and all(map(len, targets))
    assert all(target.shape[1:] == prediction.shape[1:] and target.dtype == targets[0].dtype for target in targets)
    if isinstance(weights, Tensor):
        assert weights.shape == prediction.shape[:1] and weights.dtype == torch.float32
    else:
        assert len(weights) == len(targets)
    differentiable = prediction.requires_grad and torch.is_grad_enabled()
    loss, means = _WeightedSquaredError.apply(prediction, weights, differentiable, *targets)
    return loss, means


def gradient_dtype(prediction: Tensor) -> torch.dtype:
    """Of the gradient until it is scaled. A mean over a batch leaves 1e-6 of each difference, less than fp16 can tell
    from zero: there the loss scale must come first."""
    return torch.float32 if prediction.dtype == torch.float16 else prediction.dtype


class _WeightedSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, weights: Weights, differentiable: bool, *targets: Tensor) -> Any:
        kernels = kernels_for(prediction, "loss")
        implementation = weighted_squared_error_reference if kernels is None else kernels.weighted_squared_error
        loss, means, gradient = implementation(prediction, targets, weights, with_gradient=differentiable)
        ctx.gradient, ctx.dtype = gradient, prediction.dtype
        ctx.mark_non_differentiable(means)
        return loss, means

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the gradient of this loss was given away already"
        kernels = kernels_for(gradient, "loss")
        scaled = gradient.mul_(grads[0]) if kernels is None else kernels.scale_(gradient, grads[0])
        return scaled.to(ctx.dtype), *([None] * (len(ctx.needs_input_grad) - 1))


def weighted_squared_error_reference(
    prediction: Tensor, targets: Sequence[Tensor], weights: Weights, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`weighted_squared_error` and its gradient, of the shape of the prediction, in PyTorch operations."""
    gradient = None
    if with_gradient:
        gradient = torch.empty(prediction.shape, dtype=gradient_dtype(prediction), device=prediction.device)
    losses, means, start = [], [], 0
    for part, target in enumerate(targets):
        rows = slice(start, start + len(target))
        start += len(target)
        difference = prediction[rows].float() - target.float()
        squares = difference.square()
        means.append(squares.mean())
        if isinstance(weights, Tensor):
            factor = weights[rows].view(-1, *[1] * (target.dim() - 1))
            losses.append(squares.mul_(factor).mean())
            scale = factor * (2.0 / target.numel())
        else:
            losses.append(weights[part] * means[-1])
            scale = torch.tensor(weights[part]) / target.numel() * 2.0  # rounded as autograd rounds it
        if gradient is not None:
            torch.mul(difference, scale, out=difference)
            gradient[rows] = difference
    return sum(losses[1:], losses[0]), torch.stack(means), gradient
