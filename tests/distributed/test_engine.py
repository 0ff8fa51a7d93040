"""The engine against a plain torch loop, on real DeepSpeed and gloo ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from tests.distributed import toy
from tests.distributed.conftest import Pools

STEPS = 6
EVERY = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2)]


class Reference:
    """One process, the full batch, torch's ordinary Adam: nothing of DeepSpeed and nothing of the engine."""

    def __init__(self, clip_norm: float = 0.0, decay: float = 0.0, reset_at: int | None = None) -> None:
        model = toy.make_model()
        average = {name: weight.clone() for name, weight in model.state_dict().items()}
        adam = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False, fused=False)
        self.losses, self.norms = list[float](), list[float]()
        for step in range(STEPS):
            if step == reset_at:
                adam = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False, fused=False)
            adam.param_groups[0]["lr"] = toy.learning_rate(step)
            x, t, label, target = toy.batch(step)
            loss = (model(x, t, label) - target).pow(2).mean()
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
            adam.step()
            for name, weight in model.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * weight
            self.losses.append(loss.item())
            self.norms.append(norm.item())
        self.weights = {name: weight.flatten() for name, weight in model.state_dict().items()}
        self.ema = {name: weight.flatten() for name, weight in average.items()}


def assert_weights(found: dict[str, list[float]], expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(torch.tensor(values), expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(("stage", "ranks"), EVERY)
def test_every_stage_trains_the_model_of_a_plain_loop(pools: Pools, stage: int, ranks: int) -> None:
    """Clipping, EMA and a learning rate that changes included; every stage and number of ranks."""
    expected = Reference(clip_norm=0.5, decay=0.7)
    assert min(expected.norms) > 0.5, "the clipping must bite"
    for found in pools[ranks].run("train", steps=STEPS, stage=stage, clip_norm=0.5, decay=0.7):
        assert found["losses"] == pytest.approx(expected.losses, abs=1e-6)
        assert found["norms"] == pytest.approx(expected.norms, abs=1e-5)
        assert_weights(found["weights"], expected.weights)
        assert_weights(found["ema"], expected.ema)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_a_compiled_model_learns_the_same(pools: Pools, stage: int, ranks: int) -> None:
    expected = Reference(clip_norm=0.5, decay=0.7)
    found = pools[ranks].run("train", steps=STEPS, stage=stage, clip_norm=0.5, decay=0.7, compile=True)[0]
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-6)
    assert found["norms"] == pytest.approx(expected.norms, abs=1e-5)
    assert_weights(found["weights"], expected.weights)
    assert_weights(found["ema"], expected.ema)


@pytest.mark.parametrize(("stage", "ranks"), [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)])
def test_bf16_follows_fp32(pools: Pools, stage: int, ranks: int) -> None:
    """Stages within 2e-3 of each other; bf16 has 8 bits, so within 1 % of fp32."""
    expected = Reference()
    first = pools[2].run("train", steps=STEPS, stage=1, precision="bf16")[0]
    found = pools[ranks].run("train", steps=STEPS, stage=stage, precision="bf16")[0]
    assert found["losses"] == pytest.approx(first["losses"], abs=2e-3)
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-2)
    assert_weights(found["weights"], expected.weights, tolerance=2e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_micro_batches_are_one_batch(pools: Pools, stage: int) -> None:
    expected = Reference(clip_norm=0.5)
    found = pools[2].run("train", steps=STEPS, stage=stage, micro_batch=2, clip_norm=0.5)[0]
    assert found["losses"] == pytest.approx(expected.losses, abs=1e-6)
    assert found["norms"] == pytest.approx(expected.norms, abs=1e-5)
    assert_weights(found["weights"], expected.weights)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_micro_batches_are_one_batch_in_bf16(pools: Pools, stage: int) -> None:
    whole = pools[2].run("train", steps=STEPS, stage=stage, precision="bf16")[0]
    halves = pools[2].run("train", steps=STEPS, stage=stage, precision="bf16", micro_batch=2)[0]
    assert halves["losses"] == pytest.approx(whole["losses"], rel=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reset_moments_is_a_fresh_optimiser(pools: Pools, stage: int) -> None:
    expected, kept = Reference(reset_at=3), Reference()
    assert (expected.weights["conv.weight"] - kept.weights["conv.weight"]).abs().max() > 1e-3
    found = pools[2].run("train", steps=STEPS, stage=stage, reset_at=3)[0]
    assert found["losses"] == pytest.approx(expected.losses, abs=1e-6)
    assert_weights(found["weights"], expected.weights)


def test_without_ema_the_average_is_the_weights(pools: Pools) -> None:
    found = pools[2].run("train", steps=2, stage=1)[0]
    assert found["ema"] == found["weights"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_forward_passes_before_a_backward(pools: Pools, stage: int) -> None:
    """The second term appears only after the first step, as it does with the second task."""
    model = toy.make_model()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    expected = list[float]()
    for step in range(4):
        x, t, label, target = toy.batch(step)
        loss = (model(x, t, label) - target).pow(2).mean()
        if step > 0:
            flipped = torch.cat([half.flip(0) for half in x.chunk(2)])
            loss = loss + 0.5 * model(flipped, t, None).pow(2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())
    assert pools[2].run("two_terms", steps=4, stage=stage)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_adamw_decays_every_weight(pools: Pools, stage: int) -> None:
    model = toy.make_model()
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.3, foreach=False, fused=False)
    for step in range(3):
        adamw.param_groups[0]["lr"] = toy.learning_rate(step)
        x, t, label, target = toy.batch(step)
        adamw.zero_grad()
        (model(x, t, label) - target).pow(2).mean().backward()
        adamw.step()
    found = pools[2].run("train", steps=3, stage=stage, optimizer="adamw", weight_decay=0.3)[0]
    assert_weights(found["weights"], {name: weight.flatten() for name, weight in model.state_dict().items()})


POISONED = [
    ("loss", 1, 0),
    ("infinite", 2, 0),
    ("huge", 1, 0),
    ("loss", 3, 2),  # in the first of two micro-batches
]


@pytest.mark.parametrize(("poison", "times", "micro_batch"), POISONED)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), *((s, p) for s in (1, 2, 3) for p in ("fp32", "bf16"))])
def test_a_step_that_is_not_finite_changes_nothing(
    pools: Pools, stage: int, precision: str, poison: str, times: int, micro_batch: int
) -> None:
    """Weights, moments, their step count and EMA: the run goes on as if there had been no such step, to the bit."""
    settings = {"stage": stage, "precision": precision, "micro_batch": micro_batch, "decay": 0.7, "clip_norm": 0.5}
    clean = pools[2].run("train", steps=6, **settings)[0]
    for found in pools[2].run("survive", poison=poison, times=times, **settings):
        assert found["skips"] == [[0, 0], [times, times], [times, 0]]
        assert found["weights"] == clean["weights"]
        assert found["ema"] == clean["ema"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_of_fp16_halves_and_recovers(pools: Pools, stage: int) -> None:
    """And stays at its smallest instead of ending the run."""
    for found in pools[2].run("loss_scales", schedule="xxxx...x....", stage=stage):
        assert found["scales"] == [512, 256, 256, 256, 256, 256, 512, 256, 256, 256, 512, 512]
        assert found["skips"] == [5, 0]
