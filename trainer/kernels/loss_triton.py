"""The Triton kernels of `loss`. Import only where Triton is installed; `dispatch.triton_module` does.

A first kernel reads prediction and target once, writes the gradient and one partial sum of squares for each program;
a second one, of a single program, adds the partial sums up. Both orders depend on the shapes alone: no atomics.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Triton takes tensors and plain values where kernels say tl.tensor and tl.constexpr, and options beside them.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.launch import Blocks, cut
from trainer.kernels.loss import gradient_dtype

MAX_COUNT = 2**31 - 1  # elements of a sample
ENOUGH_PROGRAMS = 2048  # with more, each takes several blocks, so that there are fewer sums to add up
SUM_BLOCK = 1024
SCALE_BLOCK = 4096
SCALE_PROGRAMS = 1024


@triton.jit
def _loss_kernel(
    predictions: tl.tensor,
    first_targets: tl.tensor,
    second_targets: tl.tensor,
    weights: tl.tensor,
    gradients: tl.tensor,
    sums: tl.tensor,
    first_factor: tl.tensor,
    second_factor: tl.tensor,
    first_rows: tl.tensor,
    count: tl.tensor,
    PER_SAMPLE: tl.constexpr,
    GRADIENT: tl.constexpr,
    EVEN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`PROGRAMS` programs for each sample, of `REPEATS` blocks; the factors make a gradient of a difference."""
    program = tl.program_id(0)
    number = program // PROGRAMS
    row = number.to(tl.int64)
    if number < first_rows:
        target_row = first_targets + row * count
        factor = tl.full((), first_factor, tl.float32)
    else:
        target_row = second_targets + (row - first_rows) * count
        factor = tl.full((), second_factor, tl.float32)
    if PER_SAMPLE:
        factor = factor * tl.load(weights + number)
    start = (program % PROGRAMS) * (REPEATS * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for repeat in tl.static_range(REPEATS):  # pyright: ignore[reportGeneralTypeIssues]
        element = start + repeat * BLOCK + tl.arange(0, BLOCK)
        if EVEN:
            mask = None
            difference = tl.load(predictions + row * count + element).to(tl.float32)
            difference -= tl.load(target_row + element).to(tl.float32)
        else:
            mask = element < count
            difference = tl.load(predictions + row * count + element, mask=mask, other=0.0).to(tl.float32)
            difference -= tl.load(target_row + element, mask=mask, other=0.0).to(tl.float32)
        total = tl.fma(difference, difference, total)
        if GRADIENT:
            gradient = (difference * factor).to(gradients.dtype.element_ty)
            tl.store(gradients + row * count + element, gradient, mask=mask)
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit
def _sum_kernel(
    sums: tl.tensor,
    weights: tl.tensor,
    loss: tl.tensor,
    means: tl.tensor,
    first_weight: tl.tensor,
    second_weight: tl.tensor,
    first_scale: tl.tensor,
    second_scale: tl.tensor,
    first_sums: tl.tensor,
    PER_SAMPLE: tl.constexpr,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The scales are one over the elements of a part; a part's sums lie together, the first part's first."""
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SUMS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < SUMS
        values = tl.load(sums + place, mask=inside, other=0.0)
        is_first = place < first_sums
        first += tl.where(is_first, values, 0.0)
        second += tl.where(is_first, 0.0, values)
        if PER_SAMPLE:
            weight = tl.load(weights + place // PROGRAMS, mask=inside, other=0.0)
            weighted += values * weight * tl.where(is_first, first_scale, second_scale)
    first_mean = tl.sum(first, axis=0) * first_scale
    second_mean = tl.sum(second, axis=0) * second_scale
    if PER_SAMPLE:
        tl.store(loss, tl.sum(weighted, axis=0))
    else:
        tl.store(loss, first_mean * first_weight + second_mean * second_weight)
    tl.store(means, first_mean)
    if PARTS > 1:
        tl.store(means + 1, second_mean)


@triton.jit
def _scale_kernel(
    values: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    PROGRAMS: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """values *= scale, in place; a scale of one is told by the device itself, and touches nothing else."""
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        program = tl.program_id(0).to(tl.int64)
        for repeat in range(REPEATS):
            place = (program + repeat * PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
            scaled = tl.load(values + place, mask=place < count).to(tl.float32) * factor
            tl.store(values + place, scaled.to(values.dtype.element_ty), mask=place < count)


def weighted_squared_error(
    prediction: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    with_gradient: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`loss.weighted_squared_error_reference`; `blocks` are given by benchmarks alone."""
    prediction, targets = prediction.contiguous(), [target.contiguous() for target in targets]
    batch, count = prediction.shape[0], prediction[0].numel()
    assert 0 < count <= MAX_COUNT, "elements of a sample are 32-bit numbers here"
    rows = [len(target) for target in targets]
    scales = [1.0 / target.numel() for target in targets]
    per_sample = isinstance(weights, Tensor)
    blocks = blocks or cut(count, prediction.dtype)
    repeats = _repeats(batch * blocks.count, blocks.count)
    programs = blocks.count // repeats
    gradient = torch.empty_like(prediction, dtype=gradient_dtype(prediction)) if with_gradient else None
    sums, loss, means = (
        prediction.new_empty(shape, dtype=torch.float32) for shape in (batch * programs, (), len(rows))
    )
    given = [1.0] * len(rows) if isinstance(weights, Tensor) else [float(weight) for weight in weights]
    table = weights.contiguous() if isinstance(weights, Tensor) else sums
    factors = [2.0 * weight * scale for weight, scale in zip(given, scales, strict=True)]
    with torch.cuda.device_of(prediction):
        _loss_kernel[(batch * programs,)](
            prediction,
            targets[0],
            targets[-1],
            table,
            prediction if gradient is None else gradient,
            sums,
            factors[0],
            factors[-1],
            rows[0],
            count,
            PER_SAMPLE=per_sample,
            GRADIENT=with_gradient,
            EVEN=blocks.even,
            PROGRAMS=programs,
            REPEATS=repeats,
            BLOCK=blocks.size,
            num_warps=blocks.num_warps,
        )
        parts = given[0], given[-1], scales[0], scales[-1], rows[0] * programs
        _sum_kernel[(1,)](
            sums,
            table,
            loss,
            means,
            *parts,
            PER_SAMPLE=per_sample,
            PARTS=len(rows),
            SUMS=batch * programs,
            PROGRAMS=programs,
            BLOCK=SUM_BLOCK,
        )
    return loss, means, gradient


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """`values.mul_(scale)` for a contiguous tensor and a scalar on its device."""
    blocks = triton.cdiv(values.numel(), SCALE_BLOCK)
    programs = min(SCALE_PROGRAMS, blocks)
    sizes = {"PROGRAMS": programs, "REPEATS": triton.cdiv(blocks, programs), "BLOCK": SCALE_BLOCK}
    with torch.cuda.device_of(values):
        _scale_kernel[(programs,)](values, scale, values.numel(), **sizes)
    return values


def _repeats(blocks: int, per_sample: int) -> int:
    """Blocks of one program: the most that leave ENOUGH_PROGRAMS and divide a sample's."""
    return max((n for n in range(1, 9) if per_sample % n == 0 and blocks // n >= ENOUGH_PROGRAMS), default=1)
