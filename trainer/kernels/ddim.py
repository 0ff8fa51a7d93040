"""One DDIM step on the device: state and prediction -> next state, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.dispatch import kernels_for
from trainer.kernels.philox import normal_reference

PREDICTION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COEFFICIENTS = 5


def ddim_update(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    *,
    predict_v: bool,
    clip: bool,
    null_prediction: Tensor | None = None,
    guidance: float = 1.0,
    seeds: Tensor | None = None,
    with_x0: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x_next = signal' x_0 + direction eps + spread z (Song et al. 2021, eq. 12), with each sample's own coefficients.

    x_0 and eps are what the prediction stands for: (x - sigma p) / signal and p, or for v (Salimans and Ho 2022,
    appendix D) signal x - sigma p and sigma x + signal p. Clipping bounds x_0 to [-1, 1] and keeps eps. Guided, p is
    (1 - guidance) null_prediction + guidance prediction (Ho and Salimans 2022, arXiv 2207.12598, eq. 6, with
    1 + w = guidance); eps and x_0 are linear in p, so guiding v guides both.

    One fused Triton kernel on CUDA, PyTorch elsewhere, which asks the device for nothing: coefficients, seeds and
    states may change under a captured CUDA graph.

    Args:
        x: (B, C, H, W) fp32.
        prediction: (B, C, H, W), fp32, bf16 or fp16; `null_prediction` alike.
        coefficients: (5, B) fp32: signal and sigma at x, signal' at x_next, direction, spread.
        predict_v: what the prediction is of: v instead of eps.
        clip: bound the predicted x_0.
        null_prediction: the prediction without class.
        guidance: its counterpart's weight.
        seeds: (B,) int64; z of sample b is `philox.normal(seeds, (C, H, W))[b]`. None: no noise.
        with_x0: also give x_0.

    Returns:
        x_next, and x_0 or None, both (B, C, H, W) fp32.
    """
    assert x.dtype == torch.float32 and x.dim() == 4 and prediction.shape == x.shape
    assert prediction.dtype in PREDICTION_DTYPES and coefficients.shape == (COEFFICIENTS, x.shape[0])
    if null_prediction is not None:
        assert null_prediction.shape == x.shape and null_prediction.dtype == prediction.dtype
    kernels = kernels_for(x, "ddim")
    implementation = ddim_update_reference if kernels is None else kernels.ddim_update
    return implementation(
        x,
        prediction,
        coefficients,
        predict_v=predict_v,
        clip=clip,
        null_prediction=null_prediction,
        guidance=guidance,
        seeds=seeds,
        with_x0=with_x0,
    )


def ddim_update_reference(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    *,
    predict_v: bool,
    clip: bool,
    null_prediction: Tensor | None = None,
    guidance: float = 1.0,
    seeds: Tensor | None = None,
    with_x0: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`ddim_update` in PyTorch operations."""
    signal, sigma, signal_next, direction, spread = coefficients.view(COEFFICIENTS, -1, 1, 1, 1)
    p = prediction.to(torch.float32)
    if null_prediction is not None:
        p = (1.0 - guidance) * null_prediction.to(torch.float32) + guidance * p
    x0, noise = x0_and_noise(x, p, signal, sigma, predict_v=predict_v)
    if clip:
        x0 = x0.clamp(-1.0, 1.0)
    x_next = signal_next * x0 + direction * noise
    if seeds is not None:
        x_next = x_next + spread * normal_reference(seeds, tuple(x.shape[1:]))
    return x_next, x0 if with_x0 else None


def x0_and_noise(
    x_t: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor, *, predict_v: bool
) -> tuple[Tensor, Tensor]:
    """The x_0 and eps that a prediction at x_t stands for, all of shapes that broadcast."""
    if predict_v:
        return signal * x_t - sigma * prediction, sigma * x_t + signal * prediction
    return (x_t - sigma * prediction) / signal, prediction
