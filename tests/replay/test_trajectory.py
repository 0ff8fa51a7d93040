"""Trajectories: a pure function of request and index, targets those of the teacher at the very same x_t."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from trainer.config import MethodName, Points, Solver
from trainer.errors import UserError
from trainer.models.teacher import load_teacher
from trainer.replay.teacher import open_teacher
from trainer.replay.trajectory import TrajectoryBatch, renoise, sample_trajectories, trajectory_labels

CPU = torch.device("cpu")


def sample(workplace: Any, indices: list[int], request: Any = None) -> tuple[TrajectoryBatch, Any, Any]:
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    request = request or workplace.request
    return sample_trajectories(model, schedule, request, np.array(indices), CPU), model, schedule


def test_same_indices_same_bytes_and_other_indices_other_points(workplace: Any) -> None:
    first, *_ = sample(workplace, [4, 5, 6, 7])
    again, *_ = sample(workplace, [4, 5, 6, 7])
    other, *_ = sample(workplace, [8, 9, 10, 11])
    assert torch.equal(first.end, again.end) and torch.equal(first.targets, again.targets)
    assert torch.equal(first.seeds, again.seeds) and torch.equal(first.t, again.t)
    assert not torch.equal(first.end, other.end)
    assert len({*first.seeds.flatten().tolist(), *other.seeds.flatten().tolist()}) == 2 * first.seeds.numel()


def test_every_class_once_in_each_run_of_trajectories(workplace: Any) -> None:
    labels = trajectory_labels(workplace.request, np.arange(300))
    assert all(sorted(labels[start : start + 3]) == [3, 5, 7] for start in range(0, 300, 3))
    orders = Counter(tuple(labels[start : start + 3]) for start in range(0, 300, 3))
    assert len(orders) == 6 and min(orders.values()) > 5  # all orders of three classes, none rare
    assert np.array_equal(labels[40:50], trajectory_labels(workplace.request, np.arange(40, 50)))


def test_without_classes_there_is_no_label(make_workplace: Callable[..., Any]) -> None:
    batch, *_ = sample(make_workplace(unconditional=True), [0, 1, 2])
    assert batch.label.tolist() == [-1, -1, -1]


def test_end_points_are_those_of_diffusers(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(clip_sample=False)
    batch, model, _ = sample(workplace, [0, 1, 2])
    reference = DDIMScheduler(60, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing="trailing")
    reference.set_timesteps(4)
    from trainer.kernels.philox import normal

    x = normal(batch.start_seeds, (1, 8, 8))
    with torch.no_grad():
        for t in reference.timesteps:
            x = reference.step(model(x, torch.full((3,), int(t)), batch.label), int(t), x).prev_sample
    torch.testing.assert_close(batch.end.float(), x, atol=2e-3, rtol=2e-3)  # fp16 storage


def test_renoised_targets_are_the_teachers_at_the_stored_end_point(workplace: Any) -> None:
    batch, model, schedule = sample(workplace, [0, 1, 2, 3])
    assert batch.end.shape == (4, 1, 8, 8) and batch.states is None and batch.targets.shape == (4, 3, 1, 8, 8)
    from trainer.kernels.philox import normal

    for point in range(3):
        t, noise = batch.t[:, point], normal(batch.seeds[:, point], (1, 8, 8))
        signal, sigma = (table[t][:, None, None, None] for table in (schedule.signal, schedule.sigma))
        with torch.no_grad():
            direct = model(signal * batch.end.float() + sigma * noise, t, batch.label)
        assert torch.equal(direct.half(), batch.targets[:, point])
    assert batch.targets.float().std() > 0.05  # a teacher that says something


def test_trajectory_points_lie_on_the_path_with_the_teachers_predictions(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(points=Points.trajectory, points_per_trajectory=3)
    batch, model, _ = sample(workplace, list(range(40)))
    assert batch.end is None and batch.states.shape == batch.targets.shape == (40, 3, 1, 8, 8)
    assert (batch.t < 59).all() and (batch.t.diff(dim=1) < 0).all(), "not the start, which all paths share"
    assert all(len(set(batch.t[:, point].tolist())) > 4 for point in range(3))  # jittered
    for point in range(3):
        with torch.no_grad():
            direct = model(batch.states[:, point].float(), batch.t[:, point], batch.label)
        torch.testing.assert_close(direct, batch.targets[:, point].float(), atol=5e-3, rtol=5e-3)


def test_kept_points_of_a_path_are_distinct_and_cover_it(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(points=Points.trajectory, steps=5, points_per_trajectory=2)
    request = replace(workplace.request, jitter=False)
    batch, *_ = sample(workplace, list(range(200)), request)
    assert (batch.t[:, 0] > batch.t[:, 1]).all()
    counts = Counter(batch.t.flatten().tolist())
    assert sorted(counts) == [11, 23, 35, 47] and min(counts.values()) > 40


@pytest.mark.parametrize(
    ("settings", "per_trajectory"),
    [
        ({}, 4 + 3),
        ({"method": MethodName.generative_replay}, 4),
        ({"points": Points.trajectory}, 4),
        ({"points": Points.both}, 4 + 1),
        ({"points": Points.both, "points_per_trajectory": 1}, 4),
        ({"solver": Solver.dpmpp}, 4 + 3),
    ],
)
def test_evaluations_are_what_the_network_was_called_for(
    make_workplace: Callable[..., Any], settings: dict[str, Any], per_trajectory: int
) -> None:
    workplace = make_workplace(**settings)
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    images = []
    model.register_forward_hook(lambda module, inputs, output: images.append(len(output)))
    batch = sample_trajectories(model, schedule, workplace.request, np.arange(5), CPU)
    assert sum(images) == batch.evaluations == 5 * per_trajectory
    assert (batch.targets is None) == ("method" in settings)


@pytest.mark.parametrize("points", list(Points))
def test_guidance_shapes_the_paths_and_not_the_targets(make_workplace: Callable[..., Any], points: Points) -> None:
    """Targets are the teacher's predictions for the class, at states where guidance has led."""
    workplace = make_workplace(points=points, label_dropout=0.1, guidance=3.0)
    guided, model, schedule = sample(workplace, [0, 1, 2, 3])
    plain, *_ = sample(workplace, [0, 1, 2, 3], replace(workplace.request, guidance=1.0, null_label=-1))
    parts = [("end", Points.trajectory), ("states", Points.renoised)]
    for name in [name for name, without in parts if points is not without]:
        assert not torch.equal(getattr(guided, name), getattr(plain, name))
    assert torch.equal(guided.start_seeds, plain.start_seeds)
    relabelled = {Points.renoised: 3, Points.trajectory: 0, Points.both: 1}[points]
    assert (guided.evaluations, plain.evaluations) == (4 * (8 + relabelled), 4 * (4 + relabelled))
    for point in range(3):
        t = guided.t[:, point]
        if point >= 3 - relabelled:
            states = renoise(schedule, guided.end, guided.seeds[:, point], t)[0]
        else:
            states = guided.states[:, point].float()
        with torch.no_grad():
            found = guided.targets[:, point].float()
            torch.testing.assert_close(found, model(states, t, guided.label), atol=5e-3, rtol=5e-3)
            unlike = model(states, t, torch.full_like(guided.label, 10))
        assert float((found - unlike).abs().max()) > 0.05


def test_a_guided_step_asks_twice_and_every_evaluation_is_a_sign_of_life(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(label_dropout=0.1, guidance=3.0)
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    images, signs = [], []
    model.register_forward_hook(lambda module, inputs, output: images.append(len(output)))
    batch = sample_trajectories(model, schedule, workplace.request, np.arange(5), CPU, lambda: signs.append(1))
    assert sum(images) == batch.evaluations == 5 * (2 * 4 + 3) and len(signs) == 11


def test_a_teacher_that_cannot_be_guided_is_refused(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace()
    request = replace(workplace.request, guidance=2.0, null_label=10)
    with pytest.raises(UserError, match=r"card\.json: null_label is None, 10 was asked for"):
        open_teacher(workplace.run, request, CPU)


def test_noisy_sampling_is_pure_too(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(eta=1.0)
    noisy, again = (sample(workplace, [0, 1, 2])[0] for _ in range(2))
    plain, *_ = sample(workplace, [0, 1, 2], replace(workplace.request, eta=0.0))
    assert torch.equal(noisy.end, again.end) and not torch.equal(noisy.end, plain.end)


def test_bf16_teacher_differs_a_little(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace()
    plain, *_ = sample(workplace, [0, 1, 2])
    request = replace(workplace.request, precision="bf16")
    rounded = sample_trajectories(*open_teacher(workplace.run, request, CPU), request, np.arange(3), CPU)
    assert plain.targets is not None and rounded.targets is not None
    assert not torch.equal(plain.targets, rounded.targets)
    assert (plain.targets.float() - rounded.targets.float()).abs().mean() < 0.1
