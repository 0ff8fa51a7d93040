"""What the trainer is fed: the right points for every world size, and what each policy does when there are none."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import MethodName, OnStarved, Placement, Points, Prediction
from trainer.diffusion.schedules import make_schedule
from trainer.errors import UserError
from trainer.kernels.philox import normal
from trainer.models.teacher import load_teacher
from trainer.replay import pool_source
from trainer.replay.decode import shard_name
from trainer.replay.draws import draws
from trainer.replay.manifest import seal, unseal
from trainer.replay.source import InlineSource, PoolSource, open_source
from trainer.replay.state import read_json, write_json
from trainer.replay.trajectory import sample_trajectories

CPU = torch.device("cpu")


@dataclass
class Ranks:
    """A world of one process after another: what rank 0 broadcasts, the others are told."""

    rank: int = 0
    size: int = 1
    told: list[int] | None = None

    def broadcast_int(self, value: int) -> int:
        if self.told is None:
            return value
        if self.rank == 0:
            self.told.append(value)
            return value
        return self.told.pop(0)


def source(workplace: Any, **changes: Any) -> PoolSource:
    options: dict[str, Any] = {
        "batch": 8,
        "world": Ranks(),
        "schedule": make_schedule(workplace.config.diffusion),
        "device": CPU,
        "dtype": torch.float32,
        "on_starved": OnStarved.wait,
        "timeout": 20.0,
    }
    return PoolSource(workplace.run, workplace.request, **(options | changes))


@pytest.fixture
def opened() -> Any:
    """Sources to be closed; afterwards no reading thread may be left."""
    sources: list[PoolSource] = []
    yield lambda *args, **kwargs: sources.append(source(*args, **kwargs)) or sources[-1]
    for one in sources:
        one.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "replay-reader"]


def test_points_are_the_teachers_at_the_positions_of_the_step(workplace: Any, opened: Any) -> None:
    workplace.fill()
    model, schedule, _ = load_teacher(workplace.run.teacher(1), CPU)
    examples = opened(workplace).points(3)
    _, trajectory, point = draws(workplace.request, 24, 32)
    for row in range(8):
        micro = (trajectory[row] % 6) // 4 * 4 + trajectory[row] // 6 * 6
        batch = sample_trajectories(
            model, schedule, workplace.request, np.arange(micro, min(micro + 4, micro // 6 * 6 + 6)), CPU
        )
        own, t, seed = trajectory[row] - micro, examples.t[row], batch.seeds[trajectory[row] - micro, point[row]]
        assert batch.t[own, point[row]] == t and batch.label[own] == examples.label[row]
        x = schedule.signal[t] * batch.images[own].float() + schedule.sigma[t] * normal(seed[None], (1, 8, 8))[0]
        assert torch.equal(examples.x[row], x)
        assert torch.equal(examples.target[row], batch.targets[own, point[row]].float())


def test_the_stored_target_is_a_direct_teacher_call_at_x_t(workplace: Any, opened: Any) -> None:
    workplace.fill(2)
    model, _, _ = load_teacher(workplace.run.teacher(1), CPU)
    examples = opened(workplace).points(0)
    with torch.no_grad():
        direct = model(examples.x, examples.t, examples.label)
    torch.testing.assert_close(direct, examples.target, atol=2e-3, rtol=2e-3)  # stored in fp16


@pytest.mark.parametrize("prediction", [Prediction.epsilon, Prediction.v])
def test_generative_replay_learns_the_noise(
    make_workplace: Callable[..., Any], opened: Any, prediction: Prediction
) -> None:
    workplace = make_workplace(method=MethodName.generative_replay)
    workplace.config.diffusion.prediction = prediction
    workplace.fill(1)
    schedule = make_schedule(workplace.config.diffusion)
    examples = opened(workplace, schedule=schedule).points(0)
    signal, sigma = (table[examples.t][:, None, None, None].double() for table in (schedule.signal, schedule.sigma))
    x, target = examples.x.double(), examples.target.double()
    end = (x - sigma * target) / signal if prediction is Prediction.epsilon else signal * x - sigma * target
    assert end.abs().max() < 1.01  # solved for the end point, which sampling had clipped
    assert 0.8 < target.std() < 1.5


@pytest.mark.parametrize("points", [Points.renoised, Points.trajectory])
def test_ranks_share_out_what_one_rank_would_use(
    make_workplace: Callable[..., Any], opened: Any, points: Points
) -> None:
    workplace = make_workplace(points=points, reuse=2)
    workplace.fill()
    alone = opened(workplace)
    shares = [opened(workplace, world=Ranks(rank, 4)) for rank in range(4)]
    for step in range(7):
        whole, parts = alone.points(step), [share.points(step) for share in shares]
        for name in ("x", "t", "target", "label"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_resuming_at_a_step_gives_that_steps_points(workplace: Any, opened: Any) -> None:
    workplace.fill()
    whole = opened(workplace)
    last = [whole.points(step) for step in range(20)][-1]
    resumed = opened(workplace, start_step=19, restored={"points_used": 152, "starved_steps": 2})
    assert torch.equal(resumed.points(19).x, last.x)
    assert whole.stats()["points_used"] == resumed.stats()["points_used"] == 160
    assert resumed.stats()["starved_steps"] == 2
    assert read_json(workplace.run.replay_progress(2))["released"] == 7  # position 152 lies in shard 8


def test_waiting_is_counted_and_ends_with_the_shard(workplace: Any, opened: Any) -> None:
    waiting = opened(workplace)
    worker = threading.Thread(target=lambda: (time.sleep(0.5), workplace.fill(1)))
    worker.start()
    examples = waiting.points(0)
    worker.join()
    stats = waiting.stats()
    assert len(examples) == 8 and 0.4 < stats["starved_seconds"] < 10 and stats["starved_steps"] == 1
    assert stats["pool_ready"] == 1 and stats["pool_needed"] == 9 and stats["teacher_evaluations"] == 42
    waiting.points(1)
    assert waiting.stats()["starved_steps"] == 1  # it was there already


def test_waiting_without_hope_ends_clearly(workplace: Any, opened: Any) -> None:
    with pytest.raises(UserError, match=r"replay.timeout=0.3 .*shard 0 is needed.*none was ever heard of"):
        opened(workplace, timeout=0.3).points(0)


def test_waiting_for_a_sampler_given_up_names_its_log(workplace: Any, opened: Any) -> None:
    import os
    import socket

    status = {"pid": os.getpid(), "host": socket.gethostname(), "restarts": 3, "given_up": "see teacher-0.log: boom"}
    write_json(workplace.run.supervisor(0), status)
    waiting = opened(workplace)
    with pytest.raises(UserError, match=r"shard 0 will not come: see teacher-0.log: boom"):
        waiting.points(0)
    assert waiting.stats()["events"] == {"corrupt": 0, "retired": 0, "restarts": 3, "given_up": 1}
    write_json(workplace.run.supervisor(0), status | {"pid": 2**22 + 1})  # left by a killed attempt
    assert waiting.stats()["events"]["given_up"] == 0


def test_a_corrupt_shard_is_waited_for_and_the_points_stay_the_same(workplace: Any, opened: Any) -> None:
    workplace.fill()
    clean = [opened(workplace).points(step) for step in range(4)]
    path = workplace.run.replay(2) / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    waiting = opened(workplace)
    worker = threading.Thread(target=lambda: (time.sleep(0.3), workplace.fill(1)))
    worker.start()
    assert all(torch.equal(waiting.points(step).x, clean[step].x) for step in range(4))
    worker.join()
    assert waiting.stats()["events"]["corrupt"] == 1


def test_another_teachers_pool_is_refused_before_the_first_step(workplace: Any) -> None:
    workplace.fill(1)
    path = workplace.run.replay(2) / "manifest.jsonl"
    path.write_bytes(seal((unseal(path.read_bytes().rstrip()) or {}) | {"teacher_id": "e" * 64}) + b"\n")
    with pytest.raises(UserError, match="made by teacher eeee"):
        source(workplace)
    assert not [thread for thread in threading.enumerate() if thread.name == "replay-reader"]


def test_closing_while_waiting_is_prompt(workplace: Any) -> None:
    waiting = source(workplace)
    waiting._read_ahead(0)
    began = time.monotonic()
    waiting.close()
    waiting.close()
    assert time.monotonic() - began < 2


def test_real_only_goes_without_and_says_so(workplace: Any, opened: Any) -> None:
    journal: list[dict[str, Any]] = []
    starved = opened(workplace, on_starved=OnStarved.real_only, journal=journal.append)
    assert starved.points(0) is None
    workplace.fill(2)
    assert [starved.points(step) is None for step in range(1, 6)] == [False, False, False, True, True]
    assert [event["step"] for event in journal] == [0, 4, 5]  # positions 32 to 39 reach into shard 2
    stats = starved.stats()
    assert stats["real_only_steps"] == 3 and stats["points_used"] == 24 and stats["starved_steps"] == 3


def test_reuse_draws_on_what_is_there(workplace: Any, opened: Any) -> None:
    journal: list[dict[str, Any]] = []
    starved = opened(workplace, on_starved=OnStarved.reuse, journal=journal.append)
    assert starved.points(0) is None  # nothing to use again yet
    workplace.fill(2)
    fresh = [starved.points(step) for step in range(1, 4)]
    again = [starved.points(step) for step in range(4, 12)]
    assert journal[1] == {"event": "replay_reused", "task": 2, "step": 4, "shards": [0, 2]}
    seen = {tuple(x.flatten().tolist()) for x in torch.cat([part.x for part in fresh])}
    repeated = [tuple(x.flatten().tolist()) for x in torch.cat([part.x for part in again])]
    assert len(set(repeated[:36])) == 36 and seen <= set(repeated)  # each point of the stock once in 36 positions
    assert starved.stats()["reused_steps"] == 8 and starved.stats()["points_used"] == 11 * 8
    starved.release(12)
    assert read_json(workplace.run.replay_progress(2)) == {"released": 4, "kept": [0, 2]}
    assert workplace.fill() == 5 and starved.points(12) is not None  # shards 4 to 8: those in between are past
    assert starved.stats()["reused_steps"] == 8


def test_fail_waits_for_the_first_shard_only(workplace: Any, opened: Any) -> None:
    failing = opened(workplace, on_starved=OnStarved.fail)
    worker = threading.Thread(target=lambda: (time.sleep(0.3), workplace.fill(1)))
    worker.start()
    assert failing.points(0) is not None and failing.points(1) is not None
    worker.join()
    with pytest.raises(UserError, match=r"starved at step 2, shards 0 to 1 .*replay.on_starved=fail"):
        failing.points(2)


@pytest.mark.parametrize("policy", [OnStarved.reuse, OnStarved.real_only, OnStarved.fail])
def test_rank_0_decides_what_is_there(workplace: Any, opened: Any, policy: OnStarved) -> None:
    workplace.fill(2)
    told: list[int] = []
    first = opened(workplace, on_starved=policy, world=Ranks(0, 2, told))
    second = opened(workplace, on_starved=policy, world=Ranks(1, 2, told))
    for step in range(4):
        assert first.points(step) is not None
    assert len(told) == 1  # once agreed, nobody asks again
    workplace.fill(2)  # the other rank must not act on what it alone has seen
    for step in range(4):
        assert second.points(step) is not None
    assert not told
    assert first.points(4) is not None and second.points(4) is not None
    assert first._agreed == second._agreed == (1, 4)


def test_rank_0_does_not_count_a_corrupt_shard(workplace: Any, opened: Any) -> None:
    workplace.fill(2)
    path = workplace.run.replay(2) / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    starved = opened(workplace, on_starved=OnStarved.real_only)
    assert [starved.points(step) is None for step in range(4)] == [False, False, True, True]
    assert starved.stats()["events"]["corrupt"] == 1
    workplace.fill(1)
    assert starved.points(3) is not None


def test_in_the_loop_the_points_are_those_of_a_pool_with_one_point_each(
    make_workplace: Callable[..., Any], opened: Any
) -> None:
    pooled = make_workplace(points_per_trajectory=1, sampler_batch=8, shard_trajectories=8)
    pooled.fill(2)
    model, schedule, _ = load_teacher(pooled.run.teacher(1), CPU)
    inline = [
        InlineSource(
            model, schedule, pooled.request, batch=8, world=Ranks(rank, 2), device=CPU, dtype=torch.float32
        ).points(1)
        for rank in range(2)
    ]
    shard = opened(pooled).points(1)
    _, trajectory, _ = draws(pooled.request, 8, 16)
    assert sorted(trajectory) == list(range(8, 16))
    for name in ("x", "t", "target", "label"):
        mine = torch.cat([getattr(part, name) for part in inline])[trajectory - 8]
        torch.testing.assert_close(mine, getattr(shard, name), atol=2e-3, rtol=2e-3)


def test_in_the_loop_counts_and_gradients(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(placement=Placement.inline, sampler_batch=3)
    schedule = make_schedule(workplace.config.diffusion)
    inline = open_source(
        workplace.config,
        workplace.run,
        workplace.request,
        world=Ranks(1, 2),
        device=CPU,
        dtype=torch.float32,
        schedule=schedule,
    )
    examples = inline.points(0)
    assert examples is not None and len(examples) == 4
    weight = torch.ones(1, requires_grad=True)
    ((examples.x * weight - examples.target) ** 2).mean().backward()  # the pairs can take part in autograd
    assert weight.grad is not None and math.isfinite(weight.grad.item())
    assert inline.stats()["teacher_evaluations"] == 8 * 5 and inline.stats()["points_used"] == 8
    inline.release(1)
    inline.close()


def test_half_precision_pairs(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    examples = opened(workplace, dtype=torch.bfloat16).points(0)
    assert examples.x.dtype == examples.target.dtype == torch.bfloat16


def test_a_request_for_fewer_steps_reads_no_further(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    workplace.request = replace(workplace.request, positions=16, shards=1)
    short = opened(workplace)
    assert [len(short.points(step)) for step in range(2)] == [8, 8]
    assert not short._pending


class FullDisk:
    """A `write_json` that has no room for the trainer's progress while `code` is set."""

    def __init__(self, code: int) -> None:
        self.code, self.refused = code, 0

    def __call__(self, path: Path, content: dict[str, Any]) -> None:
        if self.code:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code), str(path))
        write_json(path, content)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_progress_that_found_no_room_is_published_later(
    workplace: Any, opened: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    workplace.fill()
    disk = FullDisk(code)
    monkeypatch.setattr(pool_source, "write_json", disk)
    alone = opened(workplace)
    alone.points(0)
    alone.release(10)
    assert disk.refused == 3 and not workplace.run.replay_progress(2).exists()
    disk.code = 0
    alone.points(10)
    assert read_json(workplace.run.replay_progress(2))["released"] == workplace.request.shard_of(80) - 1


def test_a_full_disk_that_has_room_again_does_not_leave_trainer_and_sampler_waiting_for_each_other(
    workplace: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.config.replay.pool_gb = 6.5 * workplace.request.shard_bytes / 1e9
    workplace.ask()
    assert workplace.fill() == 6  # all that the pool holds: 13 steps of 8 points, and a half
    disk = FullDisk(0)
    monkeypatch.setattr(pool_source, "write_json", disk)
    monkeypatch.setattr(pool_source, "RETRY_SECONDS", 0.05)
    alone = opened(workplace)
    for step in range(12):
        alone.points(step)
    disk.code = errno.ENOSPC
    alone.release(12)

    def make_room() -> None:
        while disk.refused < 5:
            time.sleep(0.01)
        disk.code = 0
        while not workplace.fill(1):
            time.sleep(0.01)

    sampler = threading.Thread(target=make_room, daemon=True)
    sampler.start()
    for step in (12, 13):
        assert alone.points(step) is not None
    sampler.join()


def test_other_errors_of_the_disk_are_raised(workplace: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = opened(workplace)
    monkeypatch.setattr(pool_source, "write_json", FullDisk(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        alone.release(10)
