"""What a step must compute, written again from its equations: in float64, or fp32 without TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from claims import WrongResult
from torch import Tensor, nn

# Relative errors of a loss, the mean over a batch, and of a gradient's norm, in arithmetic of this type.
LOSS_ERROR = {"bf16": 1e-2, "fp32": 1e-5}
NORM_ERROR = {"bf16": 5e-2, "fp32": 1e-4}
STAGE_ERROR = {"bf16": 2e-3, "fp32": 1e-6}  # of the losses of ZeRO's stages among each other: what DESIGN promises
PART = 8  # images at once


def exact(device: torch.device) -> torch.dtype:
    """The type of the reference."""
    return torch.float64 if device.type == "cpu" else torch.float32


def linear_alpha_bar(timesteps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Ho et al. 2020: the product of 1 - beta, float64 (T,)."""
    return (1 - torch.linspace(start, end, timesteps, dtype=torch.float64)).cumprod(0)


@torch.no_grad()
def denoising_loss(unet: nn.Module, clean: Tensor, noise: Tensor, t: Tensor, label: Tensor) -> float:
    """The mean of |eps - eps(sqrt(a) x_0 + sqrt(1 - a) eps, t)|^2 (Ho et al. 2020, eq. 14).

    Args: unet: diffusers', of the type to compute in. clean, noise: (B, C, H, W); clean in [-1, 1].
    """
    dtype = next(unet.parameters()).dtype
    alpha_bar = linear_alpha_bar().to(clean.device)[t][:, None, None, None]
    x = alpha_bar.sqrt() * clean.double() + (1 - alpha_bar).sqrt() * noise.double()
    total = 0.0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in torch.arange(len(x), device=x.device).split(PART):
            prediction = unet(x[part].to(dtype), t[part], class_labels=label[part], return_dict=False)[0]
            total += (prediction.double() - noise[part].double()).square().sum().item()
    return total / x.numel()


def compare(what: str, found: Sequence[float], expected: Sequence[float], allowed: float) -> float:
    """The largest relative error.

    Raises:
        WrongResult: larger than allowed, or not as many numbers.
    """
    if len(found) != len(expected) or not found:
        raise WrongResult(f"{what}: {len(found)} numbers, {len(expected)} expected")
    error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not error <= allowed:
        raise WrongResult(f"{what}: {list(found)} where {list(expected)} is right (relative error {error:.2g})")
    return error
