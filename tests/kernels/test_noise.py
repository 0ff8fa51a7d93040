"""The forward process against float64 numpy, and the Triton kernels in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpret
from trainer.kernels.noise import add_noise, normalise
from trainer.kernels.philox import normal, philox4x32_, uniform

SHAPES = [(1, 1, 1), (3, 7, 5), (1, 8, 8), (1, 1, 33), (2, 5, 3)]
IMAGE_DTYPES = ["uint8", "float16", "bfloat16", "float32"]
OUTPUT_DTYPES = ["float32", "bfloat16", "float16"]
SEEDS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1234567890123])
T = torch.tensor([0, 9, 4, 5, 2])
FLIP = torch.tensor([True, False, True, False, True])
BATCH = len(SEEDS)
ALPHA_BAR = np.linspace(0.999, 0.01, 10)
SIGNAL, SIGMA = (torch.from_numpy(np.sqrt(a)).float() for a in (ALPHA_BAR, 1 - ALPHA_BAR))


def _pairs() -> tuple[np.ndarray, np.ndarray]:
    """Uniforms (n,) for the radius and for the angle."""
    edges = np.array([0, 1e-9, 1e-7, 0.25, 0.5, 2 / 3, 0.75, 1], dtype=np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-1))])
    ends = near[(near >= 0) & (near < 1)]
    u1, u2 = (grid.reshape(-1) for grid in np.meshgrid(ends, ends))
    drawn = uniform(torch.arange(8), 2 * 4096).numpy().reshape(2, -1)
    return np.concatenate([u1, drawn[0]]), np.concatenate([u2, drawn[1]])


PAIRS = _pairs()
# One rounding to the output type of values that differ by 1e-6; the interpreter truncates to bfloat16.
RELATIVE = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _case(index: int, **values: Any) -> dict[str, Any]:
    return {"name": f"case{index}", **values}


def _cases() -> list[dict[str, Any]]:
    """Every shape with every flip and target; every pair of types on one shape."""
    varied = [(s, "uint8", "float32", f, v) for s in SHAPES for f in (True, False) for v in (True, False)]
    typed = [((3, 7, 5), i, o, True, True) for i in IMAGE_DTYPES for o in OUTPUT_DTYPES]
    names = ("shape", "image_dtype", "dtype", "flip", "predict_v")
    return [_case(i, **dict(zip(names, case, strict=True))) for i, case in enumerate(varied + typed)]


CASES = _cases()


def _id(case: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in case.items() if key != "name")


def _images(case: dict[str, Any]) -> Tensor:
    generator = np.random.default_rng(7)
    shape, dtype = (BATCH, *case["shape"]), getattr(torch, case["image_dtype"])
    if dtype == torch.uint8:
        return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
    return torch.from_numpy(generator.uniform(-1, 1, shape)).to(dtype)


def _expected(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """x_t and target in float64; only the noise is ours (tested in test_philox)."""
    images = _images(case)
    x0 = images.double().numpy()
    if images.dtype == torch.uint8:
        x0 = x0 / 127.5 - 1
    if case["flip"]:
        x0 = np.where(FLIP.numpy()[:, None, None, None], x0[..., ::-1], x0)
    noise = normal(SEEDS, tuple(case["shape"])).double().numpy()
    signal, sigma = (np.sqrt(a)[T.numpy()][:, None, None, None] for a in (ALPHA_BAR, 1 - ALPHA_BAR))
    return signal * x0 + sigma * noise, signal * noise - sigma * x0 if case["predict_v"] else noise


def _check(found: Tensor, expected: np.ndarray, dtype: str) -> None:
    assert found.dtype == getattr(torch, dtype) and found.shape == expected.shape
    bound = 1e-6 + RELATIVE[dtype] * np.abs(expected)
    assert np.all(np.abs(found.double().numpy() - expected) <= bound)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_reference_against_float64(case: dict[str, Any]) -> None:
    x, target = add_noise(
        _images(case),
        SEEDS,
        T,
        SIGNAL,
        SIGMA,
        flip=FLIP if case["flip"] else None,
        predict_v=case["predict_v"],
        dtype=getattr(torch, case["dtype"]),
    )
    expected_x, expected_target = _expected(case)
    _check(x, expected_x, case["dtype"])
    _check(target, expected_target, case["dtype"])


def test_normalise_is_symmetric_and_exact_at_the_ends() -> None:
    values = normalise(torch.arange(256, dtype=torch.uint8))
    assert values[0] == -1.0 and values[255] == 1.0
    assert torch.equal(values, -values.flip(0))
    assert np.abs(values.double().numpy() - (np.arange(256) / 127.5 - 1)).max() < 1e-7


def test_input_is_left_alone() -> None:
    images = torch.rand(BATCH, 1, 8, 8)
    before = images.clone()
    add_noise(images, SEEDS, T, SIGNAL, SIGMA, flip=FLIP, predict_v=True, dtype=torch.float32)
    assert torch.equal(images, before)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the kernels give in the interpreter."""
    pytest.importorskip("triton")
    inputs = {case["name"]: _images(case).float() for case in CASES} | {"u1": PAIRS[0], "u2": PAIRS[1]}
    inputs |= {"seeds": SEEDS, "t": T, "flip": FLIP, "signal": SIGNAL, "sigma": SIGMA}
    return interpret("noise", tmp_path_factory.mktemp("triton"), CASES, inputs)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_against_float64(case: dict[str, Any], interpreted: dict[str, np.ndarray]) -> None:
    for kind, expected in zip(("x", "target"), _expected(case), strict=True):
        found = torch.from_numpy(interpreted[f"{case['name']}_{kind}"]).to(getattr(torch, case["dtype"]))
        _check(found, expected, case["dtype"])


@pytest.mark.parametrize("count", [1, 3, 33, 105, 2100])
def test_kernel_streams_equal_the_reference(count: int, interpreted: dict[str, np.ndarray]) -> None:
    assert np.array_equal(interpreted[f"uniform{count}"], uniform(SEEDS, count).numpy())
    assert np.abs(interpreted[f"normal{count}"] - normal(SEEDS, (count,)).numpy()).max() < 1e-6


def test_integers_equal_triton_s_own(interpreted: dict[str, np.ndarray]) -> None:
    """Bit for bit with `tl.philox` on the brief's words: also for counters beyond 32 bits."""
    counters = torch.from_numpy(interpreted["counters"])
    assert int(counters.max()) > 2**32
    for seed, found in zip(SEEDS, interpreted["integers"], strict=True):
        key = [(seed & 0xFFFFFFFF).expand_as(counters).clone(), ((seed >> 32) & 0xFFFFFFFF).expand_as(counters).clone()]
        zeros = torch.zeros_like(counters)
        expected = philox4x32_([counters & 0xFFFFFFFF, counters >> 32, zeros, zeros.clone()], key)
        assert np.array_equal(found.view(np.uint32), torch.stack(expected).numpy().astype(np.uint32))


def test_box_muller_against_float64(interpreted: dict[str, np.ndarray]) -> None:
    """At the ends of the range, at the bounds between half turns, and in between; the angle is rounded as ours is."""
    u1, u2 = PAIRS
    radius = np.sqrt(-2.0 * np.log(np.maximum(u1, np.float32(1e-7)).astype(np.float64)))
    angle = (u2 * np.float32(2 * np.pi)).astype(np.float64)
    for name, expected in (("pair_cosine", radius * np.cos(angle)), ("pair_sine", radius * np.sin(angle))):
        assert np.abs(interpreted[name] - expected).max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_on_the_device(case: dict[str, Any]) -> None:
    arguments = [value.cuda() for value in (_images(case), SEEDS, T, SIGNAL, SIGMA)]
    flip, dtype = FLIP.cuda() if case["flip"] else None, getattr(torch, case["dtype"])
    found = add_noise(*arguments, flip=flip, predict_v=case["predict_v"], dtype=dtype)
    for value, expected in zip(found, _expected(case), strict=True):
        _check(value.cpu(), expected, case["dtype"])
