"""Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011), one stream per 64-bit seed.

A sample of n elements uses Q = ceil(n / 4) counters; element e is lane e // Q of counter e % Q, whose words are
(low, high, 0, 0) of the int64 counter and whose key is the seed. Integers and uniforms are the same on every device
and equal to Triton's `randint4x` and `rand4x` with int64 offsets; normals (Box-Muller, as Triton's `randn4x`) agree
within 1e-6 between devices and bit for bit on one kind of device, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from trainer.kernels.dispatch import kernels_for

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
ROUNDS = 10
CPU_CHUNK = 16384  # counters worked on at once: the ten 128 kB temporaries stay in the second-level cache
UNIFORM_SCALE = 4.6566127342e-10  # the largest float32 with 2^31 times it below 1, as in Triton
TWO_PI = 6.283185307179586

Lanes = list[Tensor]


def philox4x32_(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Lanes:
    """Ten rounds over four counter words and two key words, int64 tensors of one shape holding 32-bit values.

    Overwrites its arguments. Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    product_a, product_b = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(ROUNDS):
        torch.mul(c2, ROUND_B, out=product_b)
        torch.mul(c0, ROUND_A, out=product_a)
        # Low words are masked one round later, together with the high word and the key they are mixed with.
        torch.bitwise_right_shift(product_b, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK)
        torch.bitwise_right_shift(product_a, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK)
        c1, product_b = product_b, c1
        c3, product_a = product_a, c3
        k0.add_(KEY_A)
        k1.add_(KEY_B)
    return [c0, c1.bitwise_and_(MASK), c2, c3.bitwise_and_(MASK)]


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) with 31 random bits; seeds int64 (B,) -> fp32 (B, count)."""
    kernels = kernels_for(seeds, "philox")
    return uniform_reference(seeds, count) if kernels is None else kernels.uniform(seeds, count)


def normal(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers; seeds int64 (B,) -> fp32 (B, *shape)."""
    kernels = kernels_for(seeds, "philox")
    if kernels is None:
        return normal_reference(seeds, shape)
    return kernels.normal(seeds, prod(shape)).view(-1, *shape)


def timesteps(seeds: Tensor, count: int) -> Tensor:
    """Timesteps, uniform over 0 ... count - 1, from the first uniform number of each seed; (B,) -> int64 (B,)."""
    return (uniform(seeds, 1)[:, 0] * count).to(torch.int64).clamp_(max=count - 1)


def fold_in(seeds: Tensor, data: int) -> Tensor:
    """New seeds, int64 (B,), for the `data`-th of several uses of each seed (data >= 0).

    SplitMix64 (Steele et al. 2014): output number `data` of the generator whose state is the seed.
    """
    x = seeds + _signed((data + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniform_reference(seeds: Tensor, count: int) -> Tensor:
    """`uniform` in PyTorch operations."""
    return _fill(seeds, count, lambda lanes: [_to_uniform(lane) for lane in lanes])


def normal_reference(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`normal` in PyTorch operations."""
    return _fill(seeds, prod(shape), _to_normal).view(-1, *shape)


def _fill(seeds: Tensor, count: int, transform: Callable[[Lanes], Lanes]) -> Tensor:
    """fp32 (B, count) of transformed lanes; on the CPU piece by piece, each piece in cache."""
    batch, quarter = seeds.shape[0], (count + 3) // 4
    out = torch.empty(batch, 4, quarter, dtype=torch.float32, device=seeds.device)
    chunk = max(1, quarter * batch if seeds.is_cuda else CPU_CHUNK)
    rows, columns = max(1, chunk // max(1, quarter)), min(chunk, max(1, quarter))
    for row in range(0, batch, rows):
        for column in range(0, quarter, columns):
            counters = torch.arange(column, min(column + columns, quarter), device=seeds.device)
            piece = out[row : row + rows, :, column : column + columns]
            lanes = transform(_words(seeds[row : row + rows], counters))
            for lane, values in enumerate(lanes):
                piece[:, lane] = values.view(-1, counters.shape[0])
    return out.view(batch, 4 * quarter)[:, :count].contiguous()


def _words(seeds: Tensor, counters: Tensor) -> Lanes:
    """The four 32-bit words of each (seed, counter): (B,), (Q,) int64 -> four int64 (B * Q,)."""
    shape = (seeds.shape[0], counters.shape[0])
    c0 = (counters & MASK).expand(shape).reshape(-1).clone()
    c1 = (counters >> 32).expand(shape).reshape(-1).clone()
    # Written out per counter: a key broadcast along short rows is slower than one more stream of memory.
    k0 = (seeds & MASK)[:, None].expand(shape).reshape(-1).clone()
    k1 = ((seeds >> 32) & MASK)[:, None].expand(shape).reshape(-1).clone()
    return philox4x32_((c0, c1, torch.zeros_like(c0), torch.zeros_like(c0)), (k0, k1))


def _to_uniform(word: Tensor) -> Tensor:
    """int64 words in [0, 2^32) -> fp32 in [0, 1): the int32 of the same bits, folded at zero, times 2^-31."""
    folded = word.to(torch.int32)
    folded.bitwise_xor_(folded >> 31)
    return folded.to(torch.float32).mul_(UNIFORM_SCALE)


def _to_normal(lanes: Lanes) -> Lanes:
    u0, u1, u2, u3 = (_to_uniform(lane) for lane in lanes)
    return [*_box_muller(u0, u1), *_box_muller(u2, u3)]


def _box_muller(u1: Tensor, u2: Tensor) -> Lanes:
    """Two independent normals of two uniforms (Box and Muller 1958); overwrites them."""
    radius = u1.clamp_(min=1e-7).log_().mul_(-2.0).sqrt_()
    angle = u2.mul_(TWO_PI)
    sine = torch.sin(angle).mul_(radius)
    return [angle.cos_().mul_(radius), sine]


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of the 64 bits (torch shifts the sign in)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
