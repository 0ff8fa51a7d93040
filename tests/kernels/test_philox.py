"""Philox against its published vectors, a plain-integer version of the paper's rounds, and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from trainer.kernels.philox import fold_in, normal, philox4x32_, timesteps, uniform

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]

# kat_vectors of the Random123 distribution (Salmon et al. 2011): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _philox_integers(counter: list[int], key: list[int]) -> list[int]:
    """The rounds of the paper's section 3 on Python integers."""
    c, k, mask = list(counter), list(key), 2**32 - 1
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def _uniforms(seed: int, count: int) -> np.ndarray:
    """float32 (count,), rounded as Triton does; element e is lane e // Q of counter e % Q."""
    quarter, key = (count + 3) // 4, [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    lanes = np.array([_philox_integers([q, 0, 0, 0], key) for q in range(quarter)], dtype=np.uint32)
    signed = lanes.T.reshape(-1)[:count].view(np.int32).astype(np.int64)
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)


def _normals(seed: int, count: int) -> np.ndarray:
    quarter = (count + 3) // 4
    u = _uniforms(seed, 4 * quarter).astype(np.float64).reshape(4, quarter)
    radius = np.sqrt(-2.0 * np.log(np.maximum(u[[0, 2]], 1e-7)))
    angle = 2.0 * np.pi * u[[1, 3]]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    columns = [torch.tensor([word]) for word in _words(counter)]
    result = philox4x32_(columns, [torch.tensor([word]) for word in _words(key)])
    assert [int(word) for word in result] == _words(expected)
    assert _philox_integers(_words(counter), _words(key)) == _words(expected)


@pytest.mark.parametrize("count", [1, 2, 4, 7, 33, 105])
def test_uniform_layout_and_values(count: int) -> None:
    found = uniform(torch.tensor(SEEDS), count)
    assert found.shape == (len(SEEDS), count) and found.dtype == torch.float32
    expected = np.stack([_uniforms(seed, count) for seed in SEEDS])
    assert np.array_equal(found.numpy(), expected)
    assert found.min() >= 0.0 and found.max() < 1.0


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (1, 8, 8), (33,), (2, 3, 3)])
def test_normal_layout_and_values(shape: tuple[int, ...]) -> None:
    found = normal(torch.tensor(SEEDS), shape)
    assert found.shape == (len(SEEDS), *shape) and found.is_contiguous()
    expected = np.stack([_normals(seed, int(np.prod(shape))) for seed in SEEDS]).reshape(found.shape)
    assert np.abs(found.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (1, 8, 8), (3, 33, 31), (70_001,)])
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    """Bit for bit: a step's noise must survive another world size, micro-batch and order."""
    seeds = torch.arange(40 if len(shape) > 1 or shape[0] < 100 else 3) * 0x9E3779B97F4A7C1
    together = normal(seeds, shape)
    assert torch.equal(together, torch.cat([normal(seed[None], shape) for seed in seeds]))
    assert torch.equal(together.flip(0)[:-1], normal(seeds.flip(0)[:-1], shape))


def test_moments_and_distribution() -> None:
    sample = normal(torch.arange(64), (4096,)).double()
    n = sample.numel()
    assert abs(sample.mean()) < 4 / n**0.5
    assert abs(sample.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((sample**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(sample.numpy().reshape(-1), "norm").pvalue > 1e-3


def test_independence_over_seeds_and_elements() -> None:
    sample = normal(torch.arange(64), (4096,)).double()
    between_seeds = torch.corrcoef(sample) - torch.eye(64, dtype=torch.float64)
    between_elements = torch.corrcoef(sample.view(64, 64, 64).flatten(0, 1).T) - torch.eye(64, dtype=torch.float64)
    # 2,016 coefficients of 4,096 pairs each: 5 standard errors is beyond what chance gives.
    assert between_seeds.abs().max() < 5 / 4096**0.5
    assert between_elements.abs().max() < 5 / 4096**0.5


def test_high_word_of_the_seed_counts() -> None:
    a, b = uniform(torch.tensor([5, 5 + 2**32]), 64)
    assert not torch.equal(a, b)


def test_timesteps_are_uniform_and_in_range() -> None:
    t = timesteps(torch.arange(100_000), 1000)
    assert t.dtype == torch.int64 and int(t.min()) == 0 and int(t.max()) == 999
    counts = torch.bincount(t, minlength=1000).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    first = [int(_uniforms(seed, 1)[0] * np.float32(1000)) for seed in range(200)]
    assert t[:200].tolist() == first
    assert set(timesteps(torch.arange(100), 1).tolist()) == {0}


def test_fold_in_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 1234567, as published with its reference code.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = [int(fold_in(torch.tensor([1234567]), i)) % 2**64 for i in range(4)]
    assert found == outputs
    seeds = torch.cat([fold_in(torch.arange(1000), i) for i in range(10)])
    assert seeds.unique().numel() == 10_000


def test_empty() -> None:
    assert normal(torch.empty(0, dtype=torch.int64), (3, 8, 8)).shape == (0, 3, 8, 8)
    assert uniform(torch.tensor([1, 2]), 0).shape == (2, 0)
