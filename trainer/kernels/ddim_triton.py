"""The Triton kernel of `ddim`. Import only where Triton is installed; `dispatch.triton_module` does.

Cut as in `noise_triton`: a program takes four streams of a sample, so that the noise of eta > 0 is drawn where it is
added. All is read before anything is written, which no load could be moved ahead of.
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
    prediction: tl.tensor, null_prediction: tl.tensor, element: tl.tensor, mask: tl.tensor, GUIDANCE: tl.constexpr
) -> tl.tensor:
    """What the step goes by, in fp32."""
    p = tl.load(prediction + element, mask=mask).to(tl.float32)
    if GUIDANCE != 1.0:
        null = tl.load(null_prediction + element, mask=mask).to(tl.float32)
        p = tl.fma(p, GUIDANCE, null * (1.0 - GUIDANCE))
    return p


@triton.jit
def _store(
    x: tl.tensor,
    p: tl.tensor,
    noise: tl.tensor,
    x_next: tl.tensor,
    x0_out: tl.tensor,
    element: tl.tensor,
    mask: tl.tensor,
    factors: tl.tensor,
    PREDICT_V: tl.constexpr,
    CLIP: tl.constexpr,
    NOISE: tl.constexpr,
    WITH_X0: tl.constexpr,
) -> None:
    """One stream; `factors` are 1 / signal, signal, sigma, signal', direction, spread of the sample."""
    inverse, signal, sigma, signal_next, direction, spread = factors
    if PREDICT_V:
        x0 = tl.fma(signal, x, -(sigma * p))
        eps = tl.fma(sigma, x, signal * p)
    else:
        x0 = tl.fma(-sigma, p, x) * inverse
        eps = p
    if CLIP:
        x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    following = tl.fma(signal_next, x0, direction * eps)
    if NOISE:
        following = tl.fma(spread, noise, following)
    tl.store(x_next + element, following, mask=mask)
    if WITH_X0:
        tl.store(x0_out + element, x0, mask=mask)


@triton.jit
def _factors(coefficients: tl.tensor, batch: tl.tensor, number: tl.tensor) -> tuple[tl.tensor, ...]:
    """Of a sample: 1 / signal, signal, sigma, signal', direction, spread."""
    signal = tl.load(coefficients + number)
    sigma = tl.load(coefficients + batch + number)
    signal_next = tl.load(coefficients + 2 * batch + number)
    direction = tl.load(coefficients + 3 * batch + number)
    spread = tl.load(coefficients + 4 * batch + number)
    return 1.0 / signal, signal, sigma, signal_next, direction, spread


@triton.jit
def _ddim_kernel(
    states: tl.tensor,
    predictions: tl.tensor,
    null_predictions: tl.tensor,
    coefficients: tl.tensor,
    seeds: tl.tensor,
    x_next: tl.tensor,
    x0_out: tl.tensor,
    batch: tl.tensor,
    count: tl.tensor,
    quarter: tl.tensor,
    PREDICT_V: tl.constexpr,
    CLIP: tl.constexpr,
    GUIDANCE: tl.constexpr,
    NOISE: tl.constexpr,
    WITH_X0: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    number = program // BLOCKS
    row = number.to(tl.int64)
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
    factors = _factors(coefficients, batch, number)
    state = states + row * count
    x0 = tl.load(state + e0, mask=m0)
    x1 = tl.load(state + e1, mask=m1)
    x2 = tl.load(state + e2, mask=m2)
    x3 = tl.load(state + e3, mask=m3)
    prediction = predictions + row * count
    null = null_predictions + row * count
    p0 = _load(prediction, null, e0, m0, GUIDANCE)
    p1 = _load(prediction, null, e1, m1, GUIDANCE)
    p2 = _load(prediction, null, e2, m2, GUIDANCE)
    p3 = _load(prediction, null, e3, m3, GUIDANCE)
    n0, n1, n2, n3 = x0, x1, x2, x3
    if NOISE:
        n0, n1, n2, n3 = normal4(tl.load(seeds + row), e0 + no_word(x0))
    out = x_next + row * count
    clean = x0_out + row * count
    _store(x0, p0, n0, out, clean, e0, m0, factors, PREDICT_V, CLIP, NOISE, WITH_X0)
    _store(x1, p1, n1, out, clean, e1, m1, factors, PREDICT_V, CLIP, NOISE, WITH_X0)
    _store(x2, p2, n2, out, clean, e2, m2, factors, PREDICT_V, CLIP, NOISE, WITH_X0)
    _store(x3, p3, n3, out, clean, e3, m3, factors, PREDICT_V, CLIP, NOISE, WITH_X0)


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
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`ddim.ddim_update`; `blocks` are given by benchmarks alone."""
    x, prediction, coefficients = x.contiguous(), prediction.contiguous(), coefficients.contiguous()
    x_next = torch.empty_like(x)
    x0 = torch.empty_like(x) if with_x0 else None
    batch, count = x.shape[0], x[0].numel() if len(x) else 0
    assert count <= MAX_COUNT, "elements of a sample are 32-bit numbers here"
    if batch * count == 0:
        return x_next, x0
    quarter = (count + 3) // 4
    blocks = blocks or cut(quarter, torch.float32)
    with torch.cuda.device_of(x):
        _ddim_kernel[(batch * blocks.count,)](
            x,
            prediction,
            prediction if null_prediction is None else null_prediction.contiguous(),
            coefficients,
            coefficients if seeds is None else seeds.contiguous(),
            x_next,
            x_next if x0 is None else x0,
            batch,
            count,
            quarter,
            PREDICT_V=predict_v,
            CLIP=clip,
            GUIDANCE=1.0 if null_prediction is None else float(guidance),
            NOISE=seeds is not None,
            WITH_X0=with_x0,
            EVEN=blocks.even and count % 4 == 0,
            BLOCKS=blocks.count,
            BLOCK=blocks.size,
            num_warps=blocks.num_warps,
            enable_fp_fusion=False,
        )
    return x_next, x0
