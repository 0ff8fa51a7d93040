"""Triton kernels of `philox` and `noise`. Import only where Triton is installed; `triton_kernels()` does.

Multiplications and additions are not fused, as in the PyTorch reference: its rounding, on every version of Triton.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Triton takes tensors and plain values where kernels say tl.tensor and tl.constexpr, and options beside them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 512  # counters of a program, four elements each


@triton.jit
def _uniform4(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    # The words are written out: what `randint4x` makes of an int64 offset has changed between Triton versions.
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    i0, i1, i2, i3 = tl.philox(seed, low, high, zero, zero)
    u0 = tl.uint_to_uniform_float(i0)
    u1 = tl.uint_to_uniform_float(i1)
    u2 = tl.uint_to_uniform_float(i2)
    u3 = tl.uint_to_uniform_float(i3)
    return u0, u1, u2, u3


@triton.jit
def _normal4(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    u0, u1, u2, u3 = _uniform4(seed, counter)
    n0, n1 = tl.pair_uniform_to_normal(u0, u1)
    n2, n3 = tl.pair_uniform_to_normal(u2, u3)
    return n0, n1, n2, n3


@triton.jit
def _fill_kernel(
    seeds: tl.tensor, out: tl.tensor, count: tl.tensor, quarter: tl.tensor, NORMAL: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    if NORMAL:
        z0, z1, z2, z3 = _normal4(seed, counter)
    else:
        z0, z1, z2, z3 = _uniform4(seed, counter)
    base = out + row * count
    inside = counter < quarter
    tl.store(base + counter, z0, mask=inside & (counter < count))
    tl.store(base + counter + quarter, z1, mask=inside & (counter + quarter < count))
    tl.store(base + counter + 2 * quarter, z2, mask=inside & (counter + 2 * quarter < count))
    tl.store(base + counter + 3 * quarter, z3, mask=inside & (counter + 3 * quarter < count))


@triton.jit
def _noise_lane(
    images: tl.tensor,
    x_out: tl.tensor,
    target_out: tl.tensor,
    element: tl.tensor,
    inside: tl.tensor,
    noise: tl.tensor,
    signal: tl.tensor,
    sigma: tl.tensor,
    mirrored: tl.tensor,
    width: tl.tensor,
    IS_UINT8: tl.constexpr,
    FLIP: tl.constexpr,
    PREDICT_V: tl.constexpr,
) -> None:
    source = element
    if FLIP:
        column = element % width
        source = tl.where(mirrored, element - column + (width - 1 - column), element)
    x0 = tl.load(images + source, mask=inside, other=0).to(tl.float32)
    if IS_UINT8:
        x0 = (2.0 * x0 - 255.0) * (1.0 / 255.0)
    x = signal * x0 + sigma * noise
    target = noise
    if PREDICT_V:
        target = signal * noise - sigma * x0
    tl.store(x_out + element, x.to(x_out.dtype.element_ty), mask=inside)
    tl.store(target_out + element, target.to(target_out.dtype.element_ty), mask=inside)


@triton.jit
def _noise_kernel(
    images: tl.tensor,
    seeds: tl.tensor,
    timesteps: tl.tensor,
    signals: tl.tensor,
    sigmas: tl.tensor,
    flips: tl.tensor,
    x_out: tl.tensor,
    target_out: tl.tensor,
    count: tl.tensor,
    quarter: tl.tensor,
    width: tl.tensor,
    IS_UINT8: tl.constexpr,
    FLIP: tl.constexpr,
    PREDICT_V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = counter < quarter
    t = tl.load(timesteps + row)
    signal = tl.load(signals + t)
    sigma = tl.load(sigmas + t)
    mirrored = False
    if FLIP:
        mirrored = tl.load(flips + row) != 0
    n0, n1, n2, n3 = _normal4(tl.load(seeds + row), counter)
    source, x_row, target_row = images + row * count, x_out + row * count, target_out + row * count
    e0, e1, e2, e3 = counter, counter + quarter, counter + 2 * quarter, counter + 3 * quarter
    m0, m1, m2, m3 = inside & (e0 < count), inside & (e1 < count), inside & (e2 < count), inside & (e3 < count)
    _noise_lane(source, x_row, target_row, e0, m0, n0, signal, sigma, mirrored, width, IS_UINT8, FLIP, PREDICT_V)
    _noise_lane(source, x_row, target_row, e1, m1, n1, signal, sigma, mirrored, width, IS_UINT8, FLIP, PREDICT_V)
    _noise_lane(source, x_row, target_row, e2, m2, n2, signal, sigma, mirrored, width, IS_UINT8, FLIP, PREDICT_V)
    _noise_lane(source, x_row, target_row, e3, m3, n3, signal, sigma, mirrored, width, IS_UINT8, FLIP, PREDICT_V)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """`philox.uniform`."""
    return _fill(seeds, count, is_normal=False)


def normal(seeds: Tensor, count: int) -> Tensor:
    """`philox.normal`, flat: int64 (B,) -> fp32 (B, count)."""
    return _fill(seeds, count, is_normal=True)


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
    """`noise.add_noise`."""
    images, seeds, t = images.contiguous(), seeds.contiguous(), t.contiguous()
    x = torch.empty(images.shape, dtype=dtype, device=images.device)
    target = torch.empty_like(x)
    count, batch = images[0].numel() if len(images) else 0, images.shape[0]
    if batch * count == 0:
        return x, target
    quarter, block = (count + 3) // 4, _block(count)
    with torch.cuda.device_of(images):
        _noise_kernel[(batch, triton.cdiv(quarter, block))](
            images,
            seeds,
            t,
            signal,
            sigma,
            seeds if flip is None else flip.contiguous().view(torch.uint8),
            x,
            target,
            count,
            quarter,
            images.shape[-1],
            IS_UINT8=images.dtype == torch.uint8,
            FLIP=flip is not None,
            PREDICT_V=predict_v,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return x, target


def _fill(seeds: Tensor, count: int, *, is_normal: bool) -> Tensor:
    seeds = seeds.contiguous()
    batch, quarter, block = seeds.shape[0], (count + 3) // 4, _block(count)
    out = torch.empty(batch, count, dtype=torch.float32, device=seeds.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(seeds):
        grid = (batch, triton.cdiv(quarter, block))
        _fill_kernel[grid](seeds, out, count, quarter, NORMAL=is_normal, BLOCK=block, enable_fp_fusion=False)
    return out


def _block(count: int) -> int:
    """Counters of one program: enough for a small sample, at most `MAX_BLOCK`."""
    return min(MAX_BLOCK, triton.next_power_of_2((count + 3) // 4))
