"""The Triton kernel of `noise`. Import only where Triton is installed; `dispatch.triton_module` does.

A program takes the counters of one part of a sample, so four streams of neighbouring elements, and each of its threads
16 bytes of neighbours in each stream of the results. Multiply-adds are fused where they are written out and nowhere
else: the results lie within 1e-6 of the reference in fp32.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Triton takes tensors and plain values where kernels say tl.tensor and tl.constexpr, and options beside them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.launch import Blocks, cut
from trainer.kernels.philox_triton import MAX_COUNT, no_word, normal4


@triton.jit
def _load(
    image: tl.tensor,
    element: tl.tensor,
    mask: tl.tensor,
    mirrored: tl.tensor,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
) -> tl.tensor:
    """Pixels of a sample's elements, from the other side of their line where the image is mirrored."""
    if FLIP:
        if mirrored:
            pixels = tl.load(image + (element + (WIDTH - 1) - 2 * (element % WIDTH)), mask=mask)
        else:
            pixels = tl.load(image + element, mask=mask)
    else:
        pixels = tl.load(image + element, mask=mask)
    return pixels


@triton.jit
def _store(
    pixels: tl.tensor,
    x_out: tl.tensor,
    target_out: tl.tensor,
    element: tl.tensor,
    mask: tl.tensor,
    noise: tl.tensor,
    signal: tl.tensor,
    sigma: tl.tensor,
    PREDICT_V: tl.constexpr,
) -> None:
    """x_t and target of one stream; of uint8 pixels p, x_0 = (2 p - 255) / 255 is spread over the factors."""
    values = pixels.to(tl.float32)
    if pixels.dtype == tl.uint8:
        x = tl.fma(values, signal * (2.0 / 255.0), tl.fma(sigma, noise, -signal))
    else:
        x = tl.fma(signal, values, sigma * noise)
    target = noise
    if PREDICT_V:
        if pixels.dtype == tl.uint8:
            target = tl.fma(values, sigma * (-2.0 / 255.0), tl.fma(signal, noise, sigma))
        else:
            target = tl.fma(signal, noise, -(sigma * values))
    tl.store(x_out + element, x.to(x_out.dtype.element_ty), mask=mask)
    tl.store(target_out + element, target.to(target_out.dtype.element_ty), mask=mask)


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
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    PREDICT_V: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    e0 = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    e1 = e0 + quarter
    e2 = e1 + quarter
    e3 = e2 + quarter
    if EVEN:
        m0 = None
        m1 = None
        m2 = None
        m3 = None
    else:
        inside = e0 < quarter
        m0 = inside & (e0 < count)
        m1 = inside & (e0 < count - quarter)
        m2 = inside & (e0 < count - 2 * quarter)
        m3 = inside & (e0 < count - 3 * quarter)
    t = tl.load(timesteps + row)
    signal = tl.load(signals + t)
    sigma = tl.load(sigmas + t)
    mirrored = False
    if FLIP:
        mirrored = tl.load(flips + row) != 0
    image = images + row * count
    p0 = _load(image, e0, m0, mirrored, WIDTH, FLIP)
    p1 = _load(image, e1, m1, mirrored, WIDTH, FLIP)
    p2 = _load(image, e2, m2, mirrored, WIDTH, FLIP)
    p3 = _load(image, e3, m3, mirrored, WIDTH, FLIP)
    n0, n1, n2, n3 = normal4(tl.load(seeds + row), e0 + no_word(p0))
    x_row = x_out + row * count
    target_row = target_out + row * count
    _store(p0, x_row, target_row, e0, m0, n0, signal, sigma, PREDICT_V)
    _store(p1, x_row, target_row, e1, m1, n1, signal, sigma, PREDICT_V)
    _store(p2, x_row, target_row, e2, m2, n2, signal, sigma, PREDICT_V)
    _store(p3, x_row, target_row, e3, m3, n3, signal, sigma, PREDICT_V)


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
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """`noise.add_noise`; `blocks` are given by benchmarks alone."""
    images, seeds, t = images.contiguous(), seeds.contiguous(), t.contiguous()
    x = torch.empty(images.shape, dtype=dtype, device=images.device)
    target = torch.empty_like(x)
    count, batch = images[0].numel() if len(images) else 0, images.shape[0]
    assert count <= MAX_COUNT, "elements of a sample are 32-bit numbers here"
    if batch * count == 0:
        return x, target
    quarter = (count + 3) // 4
    blocks = blocks or cut(quarter, dtype)
    with torch.cuda.device_of(images):
        _noise_kernel[(batch * blocks.count,)](
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
            WIDTH=images.shape[-1],
            FLIP=flip is not None,
            PREDICT_V=predict_v,
            EVEN=blocks.even and count % 4 == 0,
            BLOCKS=blocks.count,
            BLOCK=blocks.size,
            num_warps=blocks.num_warps,
            enable_fp_fusion=False,
        )
    return x, target
