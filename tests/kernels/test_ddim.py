"""The DDIM step against float64 numpy, in PyTorch and in Triton's interpreter."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpret
from trainer.kernels.ddim import ddim_update
from trainer.kernels.philox import normal

SEEDS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1234567890123])
BATCH = len(SEEDS)
SHAPES = [(1, 1, 1), (3, 7, 5), (1, 8, 8), (1, 1, 33), (2, 5, 3), (1, 64, 64)]
GUIDANCE = 2.5
NAMES = ("shape", "dtype", "predict_v", "clip", "guidance", "noisy", "with_x0")


def _cases() -> list[dict[str, Any]]:
    """Every combination of the options on one shape, in every type once; every shape in its two extremes."""
    flags = list(product((False, True), (True, False), (1.0, GUIDANCE), (False, True)))
    dtypes = ("float32", "bfloat16", "float16")
    varied = [((3, 7, 5), dtypes[i % 3], *options, i % 2 == 0) for i, options in enumerate(flags)]
    sized = [
        (shape, dtype, dtype == "float32", True, GUIDANCE if noisy else 1.0, noisy, noisy)
        for shape, dtype, noisy in product(SHAPES, dtypes, (False, True))
    ]
    return [{"name": f"case{i}"} | dict(zip(NAMES, case, strict=True)) for i, case in enumerate(varied + sized)]


CASES = _cases()


def _id(case: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in case.items() if key != "name")


def _inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    """fp32, predictions representable in their type; some predicted x_0 leave the unit range, one signal is tiny."""
    generator, shape = np.random.default_rng(3), (BATCH, *case["shape"])
    draw = {kind: torch.from_numpy(generator.normal(size=shape)).float() for kind in ("x", "prediction", "null")}
    dtype = getattr(torch, case["dtype"])
    draw |= {kind: draw[kind].to(dtype).float() for kind in ("prediction", "null")}
    signal = np.array([0.006, 0.3, 0.7, 0.95, 0.99995])
    signal_next = np.array([0.1, 0.5, 0.9, 0.99, 1.0])
    sigma, sigma_next = np.sqrt(1 - signal**2), np.sqrt(1 - signal_next**2)
    table = np.stack([signal, sigma, signal_next, 0.8 * sigma_next, 0.6 * sigma_next])
    return draw | {"coefficients": torch.from_numpy(table).float()}


def _expected(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_next and x_0 in float64, and the size of what was added up in x_0 before it was clipped."""
    given = {kind: value.double().numpy() for kind, value in _inputs(case).items()}
    x, p = given["x"], given["prediction"]
    signal, sigma, signal_next, direction, spread = given["coefficients"].reshape(5, BATCH, 1, 1, 1)
    if case["guidance"] != 1.0:
        p = (1 - case["guidance"]) * given["null"] + case["guidance"] * p
    x0, eps = (signal * x - sigma * p, sigma * x + signal * p) if case["predict_v"] else ((x - sigma * p) / signal, p)
    terms = (np.abs(x) + 4 * np.abs(given["null"]) + 4 * np.abs(given["prediction"])) / (
        1.0 if case["predict_v"] else signal
    )
    x0 = np.clip(x0, -1, 1) if case["clip"] else x0
    x_next = signal_next * x0 + direction * eps
    if case["noisy"]:
        x_next = x_next + spread * normal(SEEDS, tuple(case["shape"])).double().numpy()
    return x_next, x0, terms


def _check(case: dict[str, Any], x_next: Any, x0: Any) -> None:
    expected_next, expected_x0, terms = _expected(case)
    bound = 1e-6 + 3e-7 * terms
    assert np.all(np.abs(np.asarray(x_next, dtype=np.float64) - expected_next) <= bound)
    assert (x0 is not None) == case["with_x0"]
    if x0 is not None:
        assert np.all(np.abs(np.asarray(x0, dtype=np.float64) - expected_x0) <= bound)


def _call(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor | None]:
    given = {kind: value.to(device) for kind, value in _inputs(case).items()}
    dtype = getattr(torch, case["dtype"])
    return ddim_update(
        given["x"],
        given["prediction"].to(dtype),
        given["coefficients"],
        predict_v=case["predict_v"],
        clip=case["clip"],
        null_prediction=given["null"].to(dtype) if case["guidance"] != 1.0 else None,
        guidance=case["guidance"],
        seeds=SEEDS.to(device) if case["noisy"] else None,
        with_x0=case["with_x0"],
    )


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_reference_against_float64(case: dict[str, Any]) -> None:
    _check(case, *_call(case, "cpu"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    pytest.importorskip("triton")
    inputs = {f"{case['name']}_{kind}": value for case in CASES for kind, value in _inputs(case).items()}
    return interpret("ddim", tmp_path_factory.mktemp("triton"), CASES, inputs | {"seeds": SEEDS})


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_against_float64(case: dict[str, Any], interpreted: dict[str, np.ndarray]) -> None:
    _check(case, interpreted[f"{case['name']}_x_next"], interpreted.get(f"{case['name']}_x0"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_on_the_device(case: dict[str, Any]) -> None:
    x_next, x0 = _call(case, "cuda")
    _check(case, x_next.cpu(), None if x0 is None else x0.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_follows_its_inputs() -> None:
    """A graph captured once gives another step's result when its coefficients, seeds and states are overwritten."""
    case = next(case for case in CASES if case["noisy"] and case["guidance"] != 1.0)
    given = {kind: value.cuda() for kind, value in _inputs(case).items()}
    seeds = SEEDS.cuda()

    def step(x: Tensor) -> Tensor:
        return ddim_update(
            x,
            given["prediction"],
            given["coefficients"],
            predict_v=False,
            clip=True,
            null_prediction=given["null"],
            guidance=GUIDANCE,
            seeds=seeds,
        )[0]

    step(given["x"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given["x"])
    for kind in given:
        given[kind].copy_(given[kind].flip(0) if kind != "coefficients" else given[kind].flip(1))
    seeds.copy_(seeds.flip(0))
    graph.replay()
    assert torch.equal(captured, step(given["x"]))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_at_its_ends(guidance: float) -> None:
    """(1 - s) null + s class: 0 is the prediction without class, 1 the one with it; to the bit."""
    generator = torch.Generator().manual_seed(5)
    x, prediction, null = torch.randn(3, 4, 1, 8, 8, generator=generator)
    coefficients = torch.tensor([[0.5], [0.8], [0.7], [0.6], [0.0]]).repeat(1, 4)
    options: dict[str, Any] = {"predict_v": False, "clip": True}
    guided, _ = ddim_update(x, prediction, coefficients, **options, null_prediction=null, guidance=guidance)
    alone, _ = ddim_update(x, prediction if guidance else null, coefficients, **options)
    assert torch.equal(guided, alone)
