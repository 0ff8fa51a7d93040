"""The forward process on the device: image -> (x_t, target) in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.dispatch import kernels_for
from trainer.kernels.philox import normal_reference

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_noise(
    images: Tensor,
    seeds: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    *,
    flip: Tensor | None,
    predict_v: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_t = signal[t] x_0 + sigma[t] eps (Ho et al. 2020, eq. 4) and what the model shall predict from it.

    One fused Triton kernel on CUDA, PyTorch elsewhere; the two agree within 1e-6 in fp32 (eps below 6 in size).

    Args:
        images: (B, C, H, W); uint8 stands for x / 127.5 - 1, floating types are in [-1, 1] already.
        seeds: (B,) int64; eps of sample b is `philox.normal(seeds, (C, H, W))[b]`, so it does not flip with the image.
        t: (B,) int64 in [0, T).
        signal: (T,) fp32, sqrt(alpha_bar).
        sigma: (T,) fp32, sqrt(1 - alpha_bar).
        flip: (B,) bool, images to mirror left to right first; None: none.
        predict_v: the target is v = signal eps - sigma x_0 (Salimans and Ho 2022) instead of eps.
        dtype: of both results; they are computed in fp32 and rounded once.

    Returns:
        x_t and the target, both (B, C, H, W).
    """
    assert images.dtype in IMAGE_DTYPES and dtype in OUTPUT_DTYPES
    assert images.dim() == 4 and seeds.shape == t.shape == images.shape[:1] and seeds.dtype == t.dtype == torch.int64
    kernels = kernels_for(images, "noise")
    implementation = add_noise_reference if kernels is None else kernels.add_noise
    return implementation(images, seeds, t, signal, sigma, flip=flip, predict_v=predict_v, dtype=dtype)


def add_noise_reference(
    images: Tensor,
    seeds: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    *,
    flip: Tensor | None,
    predict_v: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`add_noise` in PyTorch operations."""
    x0 = normalise(images)
    if flip is not None:
        x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
    noise = normal_reference(seeds, tuple(images.shape[1:]))
    signal_B111, sigma_B111 = signal[t][:, None, None, None], sigma[t][:, None, None, None]
    x = signal_B111 * x0 + sigma_B111 * noise
    target = signal_B111 * noise - sigma_B111 * x0 if predict_v else noise
    return x.to(dtype), target.to(dtype)


def normalise(images: Tensor) -> Tensor:
    """fp32 in [-1, 1]; uint8 v stands for (2 v - 255) / 255, which is v / 127.5 - 1 without its cancellation."""
    x = images.to(torch.float32)
    return x.mul_(2.0).sub_(255.0).mul_(1.0 / 255.0) if images.dtype == torch.uint8 else x
