"""Which points a trajectory gives: of both kinds, of other solvers, with stratified timesteps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crew import Crew
from diffusers import DPMSolverMultistepScheduler
from scipy import stats
from torch import Tensor

from trainer.config import Points, Solver, Timesteps
from trainer.kernels.philox import normal, timesteps
from trainer.models.teacher import load_teacher
from trainer.replay.decode import Corrupt, decode, shard_name
from trainer.replay.draws import draws
from trainer.replay.points import gather, to_examples
from trainer.replay.pool import encode
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch, sample_trajectories
from trainer.seeds import derive

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def sample(
    workplace: Any, indices: list[int], request: ReplayRequest | None = None
) -> tuple[TrajectoryBatch, Any, Any]:
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    return sample_trajectories(model, schedule, request or workplace.request, np.array(indices), CPU), model, schedule


class Recorder:
    """A teacher that remembers what it was asked and what it said."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, list[tuple[Tensor, Tensor, Tensor]]()

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        prediction = self.model(x, t, label)
        self.calls.append((x.clone(), t.clone(), prediction.clone()))
        return prediction


# --- both kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize(("count", "on_path"), [(1, 1), (2, 1), (3, 2), (6, 3)])
def test_both_kinds_of_points_of_a_path(
    make_workplace: Callable[..., Any], count: int, on_path: int, solver: Solver
) -> None:
    """The first half are states that the teacher was asked about, the rest its end points noised again; each with what
    it said there, and it was asked no more than that."""
    workplace = make_workplace(points=Points.both, points_per_trajectory=count, solver=solver)
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    teacher = Recorder(model)
    batch = sample_trajectories(teacher, schedule, workplace.request, np.arange(12), CPU)
    renoised = count - on_path
    assert len(teacher.calls) == 4 + renoised and batch.evaluations == 12 * (4 + renoised)
    assert batch.states is not None and batch.targets is not None
    assert batch.states.shape == (12, on_path, *SHAPE) and batch.targets.shape == (12, count, *SHAPE)
    path, asked_again = teacher.calls[:4], teacher.calls[4:]
    for row in range(12):
        t = batch.t[row, :on_path]
        assert bool((t.diff() < 0).all())
        for point in range(on_path):
            x, _, said = next((x[row], t, said[row]) for x, t, said in path if t[row] == batch.t[row, point])
            assert torch.equal(batch.states[row, point], x.half())
            assert torch.equal(batch.targets[row, point], said.half())
    if not renoised:
        assert batch.end is None
        return
    assert batch.end is not None and batch.end.shape == (12, *SHAPE)
    for point, (x, t, said) in enumerate(asked_again, start=on_path):
        noise = normal(batch.seeds[:, point], SHAPE)
        signal, sigma = (table[t][:, None, None, None] for table in (schedule.signal, schedule.sigma))
        assert torch.equal(t, batch.t[:, point])
        assert torch.equal(x, signal * batch.end.float() + sigma * noise)
        assert torch.equal(batch.targets[:, point], said.half())


def test_points_on_the_path_see_all_timesteps_but_the_start_and_re_noised_ones_all(
    make_workplace: Callable[..., Any],
) -> None:
    workplace = make_workplace(points=Points.both, points_per_trajectory=6)
    batch, *_ = sample(workplace, list(range(600)))
    path, renoised = (np.bincount(t.flatten().numpy(), minlength=60) for t in (batch.t[:, :3], batch.t[:, 3:]))
    assert path[59] == 0 and stats.chisquare(path[:59]).pvalue > 1e-3 and stats.chisquare(renoised).pvalue > 1e-3


def test_the_points_on_a_path_are_those_of_trajectories_alone(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(points=Points.both, points_per_trajectory=6)
    both, *_ = sample(workplace, [0, 1, 2, 3])
    alone = replace(workplace.request, points="trajectory", points_per_trajectory=3)
    path, *_ = sample(workplace, [0, 1, 2, 3], alone)
    assert both.states is not None and both.targets is not None
    assert torch.equal(both.states, path.states) and torch.equal(both.t[:, :3], path.t)
    assert torch.equal(both.targets[:, :3], path.targets)


def as_stored(
    batch: TrajectoryBatch, request: ReplayRequest, schedule: Any, row: int, point: int
) -> tuple[Tensor, ...]:
    """x, t, target and label of a point, by the equations."""
    t = batch.t[row, point]
    if point < (request.points_per_trajectory + 1) // 2:
        assert batch.states is not None
        x = batch.states[row, point].float()
    else:
        assert batch.end is not None
        x = schedule.signal[t] * batch.end[row].float() + schedule.sigma[t] * normal(
            batch.seeds[row : row + 1, point], SHAPE
        )
        x = x[0]
    assert batch.targets is not None
    return x, t, batch.targets[row, point].float(), batch.label[row]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_shard_gives_back_what_was_sampled(make_workplace: Callable[..., Any], count: int) -> None:
    workplace = make_workplace(points=Points.both, points_per_trajectory=count)
    request = workplace.request
    batch, _, schedule = sample(workplace, list(range(6, 12)))
    _, data = encode(request, 1, [batch])
    decoded = decode(request, 1, data)
    trajectories, points = (part.flatten() for part in np.mgrid[:6, :count])
    order = np.random.default_rng(0).permutation(6 * count)
    stored = gather(request, [(order, decoded, trajectories, points)], 6 * count)
    assert stored.on_path is None if count == 1 else stored.on_path is not None
    examples = to_examples(request, stored, schedule, CPU, torch.float32)
    for place, row, point in zip(order, trajectories, points, strict=True):
        found = (examples.x[place], examples.t[place], examples.target[place], examples.label[place])
        expected = as_stored(batch, request, schedule, int(row), int(point))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shards_of_another_kind_are_corrupt(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(points=Points.both, points_per_trajectory=3)
    request = workplace.request
    batch, *_ = sample(workplace, list(range(6)))
    data = encode(request, 0, [batch])[1]
    assert batch.states is not None
    for change in ({"end": None}, {"states": None}, {"states": batch.states[:, :1]}, {"targets": None}):
        with pytest.raises(Corrupt, match=r"expected|not an fp16 array"):
            decode(request, 0, encode(request, 0, [replace(batch, **change)])[1])
    for points in ("renoised", "trajectory"):
        with pytest.raises(Corrupt, match=r"expected|not an fp16 array"):
            decode(replace(request, points=points), 0, data)


def test_a_pool_of_both_kinds_feeds_the_trainer(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(
        points=Points.both, points_per_trajectory=3, solver=Solver.dpmpp, timesteps=Timesteps.stratified
    )
    assert workplace.fill() == 9
    request = workplace.request
    line = workplace.files()[shard_name(0)]
    assert len(line) <= request.shard_bytes
    crew, kinds = Crew(workplace), set()
    try:
        for step in (0, 3):
            examples = crew.points(step)
            _, trajectory, point = draws(request, 8 * step, 8 * step + 8)
            for row in range(8):
                shard, inside = divmod(int(trajectory[row]), 6)
                first = 6 * shard + inside // 4 * 4  # micro-batches of 4 and 2
                indices = list(range(first, min(first + 4, 6 * shard + 6)))
                batch, _, schedule = sample(workplace, indices)
                expected = as_stored(batch, request, schedule, int(trajectory[row]) - first, int(point[row]))
                found = (examples.x[row], examples.t[row], examples.target[row], examples.label[row])
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                kinds.add(bool(point[row] < 2))
        assert kinds == {True, False}
        assert crew.stats()["teacher_evaluations"] == 9 * 6 * (4 + 1)
    finally:
        crew.close()


# --- solvers ----------------------------------------------------------------------------------------------------


def test_end_points_of_dpmpp_are_those_of_diffusers(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(clip_sample=False, solver=Solver.dpmpp)
    batch, model, _ = sample(workplace, [0, 1, 2])
    reference = DPMSolverMultistepScheduler(
        60, 1e-4, 0.02, "linear", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    reference.set_timesteps(4)
    x = normal(batch.start_seeds, SHAPE)
    with torch.no_grad():
        for t in reference.timesteps:
            x = reference.step(model(x, torch.full((3,), int(t)), batch.label), t, x).prev_sample
    assert batch.end is not None
    torch.testing.assert_close(batch.end.float(), x, atol=2e-3, rtol=2e-3)  # fp16 storage
    ddim, *_ = sample(workplace, [0, 1, 2], replace(workplace.request, solver="ddim"))
    assert ddim.end is not None and float((ddim.end.float() - x).abs().max()) > 0.02


# --- timesteps --------------------------------------------------------------------------------------------------


def drawn(workplace: Any, indices: list[int], request: ReplayRequest) -> Tensor:
    """Timesteps (B, P) of a teacher that costs nothing."""
    _, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    return sample_trajectories(lambda x, t, label: x, schedule, request, np.array(indices), CPU).t


def test_uniform_timesteps_are_those_of_their_seeds(workplace: Any) -> None:
    """As documented, and as they always were: a pool of an older run goes on."""
    seeds = derive(workplace.request.seed, "replay-timestep/2", np.arange(5, dtype=np.uint64)[:, None], np.arange(3))
    expected = timesteps(torch.from_numpy(seeds).reshape(-1), 60).view(5, 3)
    assert torch.equal(drawn(workplace, list(range(5)), workplace.request), expected)


@pytest.mark.parametrize("count", [2, 3, 7, 60])
def test_stratified_timesteps_lie_one_in_each_part(workplace: Any, count: int) -> None:
    """And any one of them is uniform over its part, so that all together are uniform over the schedule."""
    request = replace(workplace.request, stratified=True, points_per_trajectory=count, steps=1)
    t = drawn(workplace, list(range(3000)), request).numpy()
    part = np.arange(count)
    assert (t >= part * 60 // count).all()
    assert (t < -(-(part + 1) * 60 // count)).all()
    assert stats.chisquare(np.bincount(t.flatten(), minlength=60)).pvalue > 1e-3
    for point in (0, count - 1):
        edges = np.clip(np.arange(61) * count / 60 - point, 0, 1)  # of the timesteps, within the part
        share = np.diff(edges)
        counts = np.bincount(t[:, point], minlength=60)
        assert counts[share == 0].sum() == 0
        if (share > 0).sum() > 1:
            assert stats.chisquare(counts[share > 0], 3000 * share[share > 0]).pvalue > 1e-3


def test_one_stratified_timestep_is_a_uniform_one(workplace: Any) -> None:
    one = replace(workplace.request, points_per_trajectory=1, steps=1)
    indices = list(range(2000))
    assert torch.equal(
        drawn(workplace, indices, replace(one, stratified=True)), drawn(workplace, indices, replace(one))
    )


def test_the_re_noised_half_of_both_kinds_is_stratified_over_the_whole_schedule(workplace: Any) -> None:
    request = replace(workplace.request, points="both", stratified=True, points_per_trajectory=6, jitter=True)
    t = drawn(workplace, list(range(400)), request)[:, 3:].numpy()
    assert (t // 20 == np.arange(3)).all()
    uniform = replace(request, stratified=False)
    assert torch.equal(drawn(workplace, [0, 1], uniform)[:, :3], drawn(workplace, [0, 1], request)[:, :3])
