"""Triton kernels of `philox`, and the device functions that other kernels draw their noise with.

Import only where Triton is installed; `dispatch.triton_module` does. Integers and uniforms are those of `philox`, bit
for bit. Normals are evaluated here by polynomials on reduced arguments, with fused multiply-adds where they are
written out: as close to the reference as the library functions, at a third of their instructions. Counters and
elements of one sample are 32-bit numbers: `MAX_COUNT` elements at most.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Triton takes tensors and plain values where kernels say tl.tensor and tl.constexpr, and options beside them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COUNT = 2**31 - 1
MAX_BLOCK = 512  # counters of a program of `_fill_kernel`, four elements each


@triton.jit
def words4(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Ten rounds of Philox 4x32 on the counters (counter, 0, 0, 0), int32, with the int64 `seed` as key: four uint32.

    Each round multiplies into 64 bits, which is one instruction for both words of a product. What the first rounds do
    to the zeros, and to what depends on the seed alone, the compiler works out once.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = c0 ^ c0
    c2 = c1
    c3 = c1
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def to_uniform(word: tl.tensor) -> tl.tensor:
    """uint32 -> fp32 in [0, 1): the int32 of the same bits, folded at zero, times 2^-31 (`philox.UNIFORM_SCALE`)."""
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566127342e-10


@triton.jit
def _radius(u: tl.tensor) -> tl.tensor:
    """sqrt(-2 ln u). With u = 2^e m and m in [2/3, 4/3): -2 ln u = -2 e ln 2 + f P(f), f = m - 1.

    P is the minimax polynomial of degree 7 of -2 ln(1 + f) / f, with a relative error of 1.7e-7.
    """
    bits = tl.maximum(u, 1e-7).to(tl.int32, bitcast=True)
    exponent = ((bits - 0x3F2AAAAB) >> 23) << 23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.31549152731895447, -0.342226505279541)
    p = tl.fma(p, f, 0.32681161165237427)
    p = tl.fma(p, f, -0.39590027928352356)
    p = tl.fma(p, f, 0.5002408027648926)
    p = tl.fma(p, f, -0.6667597889900208)
    p = tl.fma(p, f, 0.9999975562095642)
    p = tl.fma(p, f, -1.9999996423721313)
    return tl.sqrt(tl.fma(exponent.to(tl.float32), -1.652591630829192e-07, p * f))  # -2 ln 2 / 2^23


@triton.jit
def to_normal2(u1: tl.tensor, u2: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Two normals of two uniforms (Box and Muller 1958).

    The angle, rounded as in the reference, is reduced by q = round(2 u2) half turns to x in [-pi/2, pi/2], where
    minimax polynomials give the sine (degree 9, error 5e-9) and the cosine (degree 8, error 5e-8); odd half turns
    change the sign of both, so of the radius.
    """
    angle = u2 * 6.283185307179586
    shifted = tl.fma(u2, 2.0, 12582912.0)  # 1.5 * 2^23: the sum is rounded to a whole number, in its last bits
    turns = shifted - 12582912.0
    x = tl.fma(turns, -3.1415927410125732, angle)  # pi in two parts
    x = tl.fma(turns, 8.742277657347586e-08, x)
    sign = shifted.to(tl.int32, bitcast=True) << 31
    radius = (_radius(u1).to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    square = x * x
    p = tl.fma(square, 2.6000395791925257e-06, -0.00019806608906947076)
    p = tl.fma(p, square, 0.008333017118275166)
    p = tl.fma(p, square, -0.16666656732559204)
    sine = tl.fma(x * square, p, x)
    p = tl.fma(square, 2.3194230379885994e-05, -0.001385592040605843)
    p = tl.fma(p, square, 0.041663989424705505)
    p = tl.fma(p, square, -0.4999993145465851)
    cosine = tl.fma(p, square, 1.0)
    return radius * cosine, radius * sine


@triton.jit
def normal4(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four normals of each counter of `philox.normal`, fp32."""
    w0, w1, w2, w3 = words4(seed, counter)
    n0, n1 = to_normal2(to_uniform(w0), to_uniform(w1))
    n2, n3 = to_normal2(to_uniform(w2), to_uniform(w3))
    return n0, n1, n2, n3


@triton.jit
def no_word(loaded: tl.tensor) -> tl.tensor:
    """int32 zeros that the compiler's layout pass believes to depend on `loaded` (its machine code has no trace of it).

    Added to a counter they give all that is computed from it the layout of the load, several neighbours to a thread:
    what is then stored needs no exchange between threads through shared memory, and goes out 16 bytes at a time.
    """
    bits = loaded  # uint8
    if loaded.dtype.primitive_bitwidth == 16:
        bits = loaded.to(tl.uint16, bitcast=True)
    elif loaded.dtype.primitive_bitwidth == 32:
        bits = loaded.to(tl.uint32, bitcast=True)
    return (bits.to(tl.uint64) >> 32).to(tl.int32)


@triton.jit
def _fill_kernel(
    seeds: tl.tensor, out: tl.tensor, count: tl.tensor, quarter: tl.tensor, NORMAL: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    if NORMAL:
        z0, z1, z2, z3 = normal4(seed, counter)
    else:
        w0, w1, w2, w3 = words4(seed, counter)
        z0 = to_uniform(w0)
        z1 = to_uniform(w1)
        z2 = to_uniform(w2)
        z3 = to_uniform(w3)
    base = out + row * count
    inside = counter < quarter
    tl.store(base + counter, z0, mask=inside & (counter < count))
    tl.store(base + counter + quarter, z1, mask=inside & (counter < count - quarter))
    tl.store(base + counter + 2 * quarter, z2, mask=inside & (counter < count - 2 * quarter))
    tl.store(base + counter + 3 * quarter, z3, mask=inside & (counter < count - 3 * quarter))


def uniform(seeds: Tensor, count: int) -> Tensor:
    """`philox.uniform`."""
    return _fill(seeds, count, is_normal=False)


def normal(seeds: Tensor, count: int) -> Tensor:
    """`philox.normal` of flat samples: (B,) -> (B, count)."""
    return _fill(seeds, count, is_normal=True)


def _fill(seeds: Tensor, count: int, *, is_normal: bool) -> Tensor:
    assert count <= MAX_COUNT, "counters are 32-bit numbers here"
    seeds = seeds.contiguous()
    batch, quarter = seeds.shape[0], (count + 3) // 4
    out = torch.empty(batch, count, dtype=torch.float32, device=seeds.device)
    if out.numel() == 0:
        return out
    block = min(MAX_BLOCK, triton.next_power_of_2(quarter))
    with torch.cuda.device_of(seeds):
        grid = (batch, triton.cdiv(quarter, block))
        _fill_kernel[grid](seeds, out, count, quarter, NORMAL=is_normal, BLOCK=block, enable_fp_fusion=False)
    return out
