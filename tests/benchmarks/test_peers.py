"""The peers do what they are taken for: diffusers' loop learns, PyTorch's step is the engine's, the loop is DDIM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from claims import WrongResult
from speed.card import forward_flops
from speed.peers import DiffusersSampling, DiffusersTraining, check_training, make_unet
from speed.plain import PlainTraining
from speed.reference import compare, denoising_loss, linear_alpha_bar
from speed.sizes import SIZES, make_config, random_examples, random_images
from speed.trajectories import ddim_end

from trainer.config import DiffusionConfig
from trainer.diffusion.schedules import make_schedule
from trainer.models.denoiser import build_denoiser
from trainer.steps import fresh_model
from trainer.world import World

QUICK = SIZES["quick"]
CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)


def training(tmp_path: Path, *, autocast: bool = False, lr: float = 1e-4) -> DiffusersTraining:
    torch.manual_seed(0)
    images, labels = random_images(QUICK, 2 * QUICK.batch, CPU)
    return DiffusersTraining(make_unet(QUICK, tmp_path), images, labels, batch=QUICK.batch, autocast=autocast, lr=lr)


def test_the_first_loss_of_diffusers_loop_is_the_denoising_loss(tmp_path: Path) -> None:
    peer = training(tmp_path)
    unet = make_unet(QUICK, tmp_path).double()
    state = torch.get_rng_state()
    loss, norm = peer.step()
    torch.set_rng_state(state)
    clean, label = peer.batches[0]
    noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    expected = (unet(x, t, class_labels=label).sample - noise).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert denoising_loss(unet, clean, noise, t, label) == pytest.approx(expected.item(), rel=1e-9)
    expected.backward()
    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)


def test_diffusers_loop_learns(tmp_path: Path) -> None:
    peer = training(tmp_path, lr=2e-3)
    losses = [peer.step()[0].item() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_wrong_peer_is_found_out(tmp_path: Path) -> None:
    assert check_training(training(tmp_path, autocast=True), make_unet(QUICK, tmp_path), "bf16") < 1e-2
    other = make_unet(QUICK, tmp_path)
    with torch.no_grad():
        other.conv_out.weight.mul_(3)
    with pytest.raises(WrongResult, match="diffusers' loop"):
        check_training(training(tmp_path), other, "fp32")


def test_compare_counts_and_bounds() -> None:
    assert compare("x", [1.0, 2.02], [1.0, 2.0], 0.011) == pytest.approx(0.01)
    for found, expected in (([1.0, 2.1], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0]), ([], [])):
        with pytest.raises(WrongResult):
            compare("x", found, expected, 0.011)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_own_step_is_adam_on_the_clipped_gradient(tmp_path: Path, dtype: torch.dtype) -> None:
    """In parts or whole, against torch's unfused Adam on the model itself."""
    config = make_config(QUICK, tmp_path, "plain")
    ours = PlainTraining(fresh_model(config), config, dtype, WORLD, parts=2)
    theirs = fresh_model(config).double()
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0, eps=1e-8)
    for x, t, label, target in random_examples(QUICK, 3, 0, WORLD, torch.float32):
        loss, norm = ours.step(x, t, label, target)
        adam.zero_grad()
        expected = (theirs(x, t, label) - target).square().mean()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-4)


def test_bf16_weights_follow_fp32_masters(tmp_path: Path) -> None:
    config = make_config(QUICK, tmp_path, "plain")
    model = fresh_model(config)
    initial = [weight.detach().clone() for weight in model.parameters()]
    ours = PlainTraining(model, config, torch.bfloat16, WORLD)
    assert all(torch.equal(master, value) for master, value in zip(ours.masters, initial, strict=True))
    ours.step(*random_examples(QUICK, 1, 0, WORLD, torch.bfloat16)[0])
    for weight, master, average, start in zip(ours.weights, ours.masters, ours.averages, initial, strict=True):
        assert weight.dtype is torch.bfloat16 and weight.grad is None
        assert torch.equal(weight, master.to(torch.bfloat16))
        torch.testing.assert_close(average, start + 1e-4 * (master - start), rtol=0, atol=1e-7)
    assert not torch.equal(ours.masters[0], initial[0])


def test_diffusers_ddim_loop_is_the_equation(tmp_path: Path) -> None:
    unet = make_unet(QUICK, tmp_path)
    sampling = DiffusersSampling(unet, CPU, torch.float64, compiled=False, channels_last=False)
    start, label = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(4) % 2
    with torch.no_grad():
        expected = ddim_end(sampling.unet, start, label, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    torch.testing.assert_close(sampling.sample(start, label, 10), expected, rtol=0, atol=1e-4)


def test_the_schedule_is_the_programs() -> None:
    ours = make_schedule(DiffusionConfig())
    torch.testing.assert_close(ours.signal.double().square(), linear_alpha_bar(), rtol=1e-5, atol=1e-8)


def test_the_unet_of_the_gpu_is_the_one_of_the_issue(tmp_path: Path) -> None:
    """116 M parameters; 79.4 GFLOP forward, as measured on the card by another counter."""
    config = make_config(SIZES["gpu"], tmp_path, "gpu")
    with torch.device("meta"):
        model = build_denoiser(config.model, image_size=64, channels=3, max_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(116e6, rel=0.01)
    assert forward_flops(config) == pytest.approx(79.4e9, rel=0.01)
