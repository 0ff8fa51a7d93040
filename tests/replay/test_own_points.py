"""Points that belong to a method: pure noise, states where a path is stopped, the current task's own images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from crew import Crew, Ranks
from scipy import stats
from torch import Tensor

from trainer.config import MethodName, Placement, Timesteps
from trainer.data.batch import Examples
from trainer.diffusion.schedules import make_schedule
from trainer.models.teacher import load_teacher
from trainer.replay.decode import decode, shard_name
from trainer.replay.draws import draws
from trainer.replay.request import estimate, read_request
from trainer.replay.source import CurrentSource, InlineSource, open_source

CPU = torch.device("cpu")
CLASSES = [7, 3, 5]
GAUSSIAN, PARTIAL, LWF = MethodName.gaussian_distillation, MethodName.partial_generation, MethodName.lwf


def direct(workplace: Any, examples: Examples) -> Tensor:
    """What the teacher itself says."""
    model, _, _ = load_teacher(workplace.run.teacher(1), CPU)
    with torch.no_grad():
        return model(examples.x, examples.t, examples.label)


def in_the_loop(workplace: Any, rank: int = 0, size: int = 1) -> Any:
    return open_source(
        workplace.config,
        workplace.run,
        workplace.request,
        world=Ranks(rank, size),
        device=CPU,
        dtype=torch.float32,
        schedule=make_schedule(workplace.config.diffusion),
    )


@pytest.fixture
def crew() -> Iterator[Callable[..., Crew]]:
    made: list[Crew] = []
    yield lambda *args: made.append(Crew(*args)) or made[-1]
    for one in made:
        one.close()


# --- Gaussian distillation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", list(Timesteps))
def test_noise_is_standard_normal_at_every_timestep_with_the_teachers_answer(
    make_workplace: Callable[..., Any], crew: Callable[..., Crew], timesteps: Timesteps
) -> None:
    workplace = make_workplace(method=GAUSSIAN, timesteps=timesteps)
    workplace.fill()
    source = crew(workplace)
    examples = [source.points(step) for step in range(20)]
    for one in examples[:3]:
        torch.testing.assert_close(one.target, direct(workplace, one), atol=2e-3, rtol=2e-3)  # stored in fp16
    x, t = torch.cat([one.x for one in examples]), torch.cat([one.t for one in examples])
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    assert len(torch.unique(x.flatten(1), dim=0)) == len(x) == 160, "no noise twice"
    assert stats.chisquare(np.histogram(t.numpy(), 6, (0, 60))[0]).pvalue > 1e-3
    assert Counter(torch.cat([one.label for one in examples]).tolist()).keys() == set(CLASSES)


def test_a_shard_of_noise_holds_targets_and_nothing_else_of_its_size(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(method=GAUSSIAN)
    assert workplace.fill(1) == 1
    request = read_request(workplace.run.replay_request(2))
    data = workplace.files()[shard_name(0)]
    shard = decode(request, 0, data)
    assert shard.end is None and shard.states is None and shard.targets is not None
    assert shard.targets.shape == (6, 3, 1, 8, 8) and len(data) <= request.shard_bytes
    assert estimate(request)["evaluations"] == 9 * 18, "one for each point"


def test_noise_in_the_loop_is_that_of_a_pool_with_one_point_each(
    make_workplace: Callable[..., Any], crew: Callable[..., Crew]
) -> None:
    pooled = make_workplace("pooled", method=GAUSSIAN, points_per_trajectory=1, shard_trajectories=8)
    pooled.fill()
    model, schedule, _ = load_teacher(pooled.run.teacher(1), CPU)
    options: dict[str, Any] = {"batch": 8, "device": CPU, "dtype": torch.float32}
    parts = [
        InlineSource(model, schedule, pooled.request, world=Ranks(rank, 2), **options).points(1) for rank in range(2)
    ]
    shard = crew(pooled).points(1)
    _, trajectory, _ = draws(pooled.request, 8, 16)
    for name in ("x", "t", "label", "target"):
        mine = torch.cat([getattr(part, name) for part in parts])[trajectory - 8]
        torch.testing.assert_close(mine, getattr(shard, name), atol=2e-3, rtol=2e-3)


# --- partial generation -----------------------------------------------------------------------------------------


def test_a_path_stopped_in_the_loop_gives_its_state_and_the_prediction_there(
    make_workplace: Callable[..., Any],
) -> None:
    workplace = make_workplace(method=PARTIAL, placement=Placement.inline, sampler_batch=8)
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    calls = list[tuple[Tensor, Tensor, Tensor]]()

    def teacher(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append((x, t, model(x, t, label)))
        return calls[-1][2]

    source = InlineSource(teacher, schedule, workplace.request, batch=8, world=Ranks(), device=CPU, dtype=torch.float32)
    stopped = Counter[int]()
    for step in range(20):
        calls.clear()
        examples = source.points(step)
        assert len(calls) == 4, "the prediction at the point is one of the path's own"
        for row in range(8):
            number = next(number for number, (_, t, _) in enumerate(calls) if t[row] == examples.t[row])
            stopped[number] += 1
            assert torch.equal(examples.x[row], calls[number][0][row].half().float())
            assert torch.equal(examples.target[row], calls[number][2][row].half().float())
    assert source.stats()["teacher_evaluations"] == 160 * 4
    assert stopped[0] == 0, "not at the start, whose timestep all paths share"
    assert stats.chisquare([stopped[number] for number in range(1, 4)]).pvalue > 1e-3, "anywhere else on the way"


def test_a_pool_takes_several_states_of_each_path(
    make_workplace: Callable[..., Any], crew: Callable[..., Crew]
) -> None:
    workplace = make_workplace(method=PARTIAL)
    workplace.fill(2)
    examples = crew(workplace).points(0)
    torch.testing.assert_close(examples.target, direct(workplace, examples), atol=5e-3, rtol=5e-3)
    assert estimate(workplace.request)["evaluations"] == 9 * 6 * 4


# --- LwF --------------------------------------------------------------------------------------------------------


def current(count: int) -> Examples:
    """Noisy images of classes that the teacher does not know."""
    random = torch.Generator().manual_seed(3)
    x, target = torch.randn(2, count, 1, 8, 8, generator=random)
    t = torch.randint(0, 60, (count,), generator=random)
    return Examples(x, t, target, torch.randint(8, 10, (count,), generator=random))


def test_the_teacher_is_asked_about_the_batch_itself(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(method=LWF, placement=Placement.inline, sampler_batch=3)
    source, batch = in_the_loop(workplace), current(8)
    assert isinstance(source, CurrentSource)
    found = source.points(5, batch)
    assert torch.equal(found.x, batch.x) and torch.equal(found.t, batch.t)
    assert set(found.label.tolist()) <= set(CLASSES)
    torch.testing.assert_close(found.target, direct(workplace, found), atol=1e-5, rtol=1e-5)
    assert not found.target.requires_grad
    assert (source.stats()["teacher_evaluations"], source.stats()["points_used"]) == (8, 8)
    assert estimate(workplace.request)["evaluations"] == 160


def test_the_classes_asked_for_depend_on_the_position_alone(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(method=LWF, placement=Placement.inline)
    batch = current(8)
    whole = in_the_loop(workplace).points(5, batch)
    halves = [
        in_the_loop(workplace, rank, 2).points(
            5, Examples(*(part[rank * 4 : rank * 4 + 4] for part in (batch.x, batch.t, batch.target, batch.label)))
        )
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([half.label for half in halves]), whole.label)
    source = in_the_loop(workplace)
    labels = Counter(label for step in range(100) for label in source.points(step, batch).label.tolist())
    assert stats.chisquare([labels[label] for label in CLASSES]).pvalue > 1e-3


def test_without_classes_nothing_is_asked_for(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(method=LWF, placement=Placement.inline, unconditional=True)
    batch = current(8)
    found = in_the_loop(workplace).points(0, batch)
    assert torch.equal(found.label, batch.label)
    torch.testing.assert_close(found.target, direct(workplace, found), atol=1e-5, rtol=1e-5)
