"""The weighted squared error and its gradient against float64 numpy, in PyTorch and in Triton's interpreter."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpret
from trainer.kernels.loss import weighted_squared_error, weighted_squared_error_reference

SHAPES = [(1, 1, 1), (3, 7, 5), (1, 8, 8), (1, 1, 33), (2, 5, 3), (1, 64, 64)]
ROWS = [[5], [3, 2], [1, 4]]
DTYPES = ["float32", "bfloat16", "float16"]
WEIGHTS = [0.3, 1.7]
NAMES = ("shape", "dtypes", "rows", "per_sample", "with_gradient")
# One rounding to the gradient's type; the interpreter truncates to bfloat16.
RELATIVE = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _cases() -> list[dict[str, Any]]:
    """Every shape cut every way, every pair of types on one shape, and a batch of more programs than one sum holds."""
    sized = [
        (shape, (DTYPES[i % 3],) * 2, *rest) for i, (shape, *rest) in enumerate(product(SHAPES, ROWS, (0, 1), (1,)))
    ]
    typed = [((3, 7, 5), pair, ROWS[1], 0, 1) for pair in product(DTYPES, DTYPES)]
    large = [((2, 1, 1), ("float32", "float32"), [700, 400], per_sample, per_sample) for per_sample in (0, 1)]
    long = [((1, 1, 32), ("bfloat16", "bfloat16"), [600, 500], 1, 0)]  # several blocks to a program
    return [
        {"name": f"case{i}", "weights": WEIGHTS[: len(case[2])], "block": 8 if case in long else 0}
        | dict(zip(NAMES, case, strict=True))
        for i, case in enumerate([*sized, *typed, *large, *long])
    ]


CASES = _cases()
UNSCALED = torch.linspace(-3, 3, 9001)


def _id(case: dict[str, Any]) -> str:
    return "-".join(str(case[key]) for key in NAMES)


def _inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    """prediction, target and weights of the samples, fp32 holding values of their types."""
    generator, batch = np.random.default_rng(11), sum(case["rows"])
    shape = (batch, *case["shape"])
    values = {
        kind: torch.from_numpy(generator.normal(size=shape)).to(getattr(torch, dtype)).float()
        for kind, dtype in zip(("prediction", "target"), case["dtypes"], strict=True)
    }
    return values | {"weights": torch.from_numpy(generator.uniform(0.1, 2, batch)).float()}


def _expected(case: dict[str, Any]) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, means and gradient in float64."""
    given = {kind: value.double().numpy() for kind, value in _inputs(case).items()}
    difference = given["prediction"] - given["target"]
    parts = np.repeat(np.arange(len(case["rows"])), case["rows"])
    weights = given["weights"] if case["per_sample"] else np.array(case["weights"])[parts]
    factor = weights / (np.array(case["rows"])[parts] * np.prod(case["shape"]))
    factor = factor.reshape(-1, 1, 1, 1)
    means = np.array([np.mean(difference[parts == part] ** 2) for part in range(len(case["rows"]))])
    return float((factor * difference**2).sum()), means, 2 * factor * difference


def _check(case: dict[str, Any], loss: Any, means: Any, gradient: Any) -> None:
    expected_loss, expected_means, expected_gradient = _expected(case)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    np.testing.assert_allclose(means, expected_means, rtol=1e-6)
    assert (gradient is not None) == case["with_gradient"]
    if gradient is not None:
        relative = RELATIVE[case["dtypes"][0]]
        smallest = 2.0**-24 if case["dtypes"][0] == "float16" else 0.0  # of its subnormal numbers
        np.testing.assert_allclose(gradient, expected_gradient, rtol=relative, atol=smallest)


def _arguments(case: dict[str, Any], device: str) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    given = {kind: value.to(device) for kind, value in _inputs(case).items()}
    prediction = given["prediction"].to(getattr(torch, case["dtypes"][0]))
    targets = given["target"].to(getattr(torch, case["dtypes"][1])).split(case["rows"])
    return prediction, targets, given["weights"] if case["per_sample"] else case["weights"]


def _differentiated(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor, Any]:
    prediction, targets, weights = _arguments(case, device)
    prediction.requires_grad_(bool(case["with_gradient"]))
    loss, means = weighted_squared_error(prediction, targets, weights)
    assert not means.requires_grad and loss.requires_grad == case["with_gradient"]
    if case["with_gradient"]:
        loss.backward()
    gradient = None if prediction.grad is None else prediction.grad.float().cpu().numpy()
    return loss.detach().cpu(), means.cpu(), gradient


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_reference_against_float64(case: dict[str, Any]) -> None:
    _check(case, *_differentiated(case, "cpu"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    pytest.importorskip("triton")
    inputs = {f"{case['name']}_{kind}": value for case in CASES for kind, value in _inputs(case).items()}
    return interpret("loss", tmp_path_factory.mktemp("triton"), CASES, inputs | {"unscaled": UNSCALED})


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_against_float64(case: dict[str, Any], interpreted: dict[str, np.ndarray]) -> None:
    name = case["name"]
    _check(case, interpreted[f"{name}_loss"], interpreted[f"{name}_means"], interpreted.get(f"{name}_gradient"))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_kernel_scales_in_place(scale: float, interpreted: dict[str, np.ndarray]) -> None:
    assert np.array_equal(interpreted[f"scaled{scale}"], (UNSCALED * scale).numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_on_the_device(case: dict[str, Any]) -> None:
    """And to the same bits again: no order of summing up is left to chance."""
    first, second = _differentiated(case, "cuda"), _differentiated(case, "cuda")
    _check(case, *first)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_gradient_is_autograd_s_own() -> None:
    """To the bit where the weights are those of parts: training on the CPU goes the way it would without this."""
    prediction = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).split([3, 2])
    ours, theirs = (prediction.clone().requires_grad_() for _ in range(2))
    loss, _ = weighted_squared_error(ours, targets, [1 / 3, 2 / 3])
    parts = theirs.split([3, 2])
    plain = [(part - target).square().mean() for part, target in zip(parts, targets, strict=True)]
    expected = 1 / 3 * plain[0] + 2 / 3 * plain[1]
    loss.backward()
    expected.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(loss, expected) and torch.equal(ours.grad, theirs.grad)


def test_what_comes_after_the_loss_scales_the_gradient_once() -> None:
    prediction, target = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    prediction.requires_grad_()
    loss, _ = weighted_squared_error(prediction, [target], [0.5])
    (loss * 3.0).backward(retain_graph=True)
    expected = 3.0 * weighted_squared_error_reference(prediction.detach(), [target], [0.5], with_gradient=True)[2]
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-6, atol=0)
    with pytest.raises(AssertionError, match="given away"):
        loss.backward()


def test_a_loss_scale_saves_small_gradients_of_fp16() -> None:
    """Each is 2e-7 before it is scaled, where fp16 has steps of 6e-8."""
    target = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(3)).half()
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(4))
    prediction = (target + 0.05 * noise).half().requires_grad_()
    (weighted_squared_error(prediction, [target], [1.0])[0] * 2.0**16).backward()
    expected = (prediction.detach().double() - target.double()) * (2.0**17 / target.numel())
    assert prediction.grad is not None and prediction.grad.dtype is torch.float16
    torch.testing.assert_close(prediction.grad.double(), expected, rtol=2.0**-10, atol=2.0**-24)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    prediction = torch.zeros(2, 1, 2, 2, requires_grad=True)
    with torch.no_grad():
        loss, _ = weighted_squared_error(prediction, [torch.ones(2, 1, 2, 2)], [1.0])
    assert not loss.requires_grad and loss == 1.0


@pytest.mark.parametrize("per_sample", [False, True])
def test_in_a_compiled_function(per_sample: bool) -> None:
    """One graph, the same numbers: dynamo and the automatic differentiation ahead of time both see through it."""
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(5, 1, 4, 4, generator=generator), torch.rand(5, generator=generator)
    targets = torch.randn(5, 1, 4, 4, generator=generator).split([3, 2])

    def step(factor: Tensor) -> tuple[Tensor, Tensor]:
        loss, means = weighted_squared_error(factor * x, targets, weights if per_sample else [0.25, 0.75])
        return loss * 2.0, means

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        factor = torch.tensor(1.5, requires_grad=True)
        loss, means = function(factor)
        loss.backward()
        results.append((loss.detach(), means, factor.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
