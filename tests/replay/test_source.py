"""What the trainer is fed: the right points for every world size, and what each policy does when there are none."""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crew import Crew, Ranks

from trainer.config import MethodName, OnStarved, Placement, Points, Prediction
from trainer.diffusion.schedules import make_schedule
from trainer.errors import ToldElsewhere, UserError
from trainer.kernels.philox import normal
from trainer.models.teacher import load_teacher
from trainer.replay import pool_source, reader, transport
from trainer.replay.decode import shard_name
from trainer.replay.draws import draws
from trainer.replay.manifest import Manifest
from trainer.replay.reader import BadShard, Offer
from trainer.replay.source import InlineSource, open_source
from trainer.replay.state import write_json
from trainer.replay.trajectory import sample_trajectories
from trainer.replay.transport import FilePool, read_offered

CPU = torch.device("cpu")


@pytest.fixture
def opened() -> Any:
    """Crews to be closed; afterwards no reading thread may be left."""
    crews: list[Crew] = []
    yield lambda *args, **kwargs: crews.append(Crew(*args, **kwargs)) or crews[-1]
    for crew in crews:
        crew.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("replay-reader")]


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
        x = schedule.signal[t] * batch.end[own].float() + schedule.sigma[t] * normal(seed[None], (1, 8, 8))[0]
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


@pytest.mark.parametrize("points", list(Points))
def test_ranks_share_out_what_one_rank_would_use(
    make_workplace: Callable[..., Any], opened: Any, points: Points
) -> None:
    workplace = make_workplace(points=points, reuse=2)
    workplace.fill()
    alone, four = opened(workplace), opened(workplace, 4)
    for step in range(7):
        whole, parts = alone.points(step), four.points(step)
        for name in ("x", "t", "target", "label"):
            assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_resuming_at_a_step_gives_that_steps_points(workplace: Any, opened: Any) -> None:
    workplace.fill()
    whole = opened(workplace)
    last = [whole.points(step) for step in range(20)][-1]
    resumed = opened(workplace, start_step=19, restored={"points_used": 152, "starved_steps": 2})
    assert torch.equal(resumed.points(19).x, last.x)
    assert whole.stats()["points_used"] == resumed.stats()["points_used"] == 160
    assert resumed.stats()["starved_steps"] == 2
    assert resumed.told() == {"released": 7, "kept": [0, 0], "used": 8}  # position 152 lies in shard 8


def test_samplers_are_told_what_is_used_and_what_is_released(workplace: Any, opened: Any) -> None:
    workplace.fill()
    crew = opened(workplace)
    assert crew.told() == {"released": 0, "kept": [0, 0], "used": 0}
    for step in range(12):
        crew.points(step)
    assert crew.told() == {"released": 0, "kept": [0, 0], "used": 4}  # nothing is given back without a checkpoint
    crew.main.release(10)
    assert crew.told() == {"released": 3, "kept": [0, 0], "used": 4}


def test_waiting_is_counted_and_ends_with_the_shard(workplace: Any, opened: Any) -> None:
    waiting = opened(workplace, 2)
    worker = threading.Thread(target=lambda: (time.sleep(0.5), workplace.fill(1)))
    worker.start()
    examples = waiting.points(0)
    worker.join()
    stats = waiting.stats()
    assert len(examples) == 8 and 0.4 < stats["starved_seconds"] < 10 and stats["starved_steps"] == 1
    assert stats["pool_ready"] == 1 and stats["pool_needed"] == 9 and stats["teacher_evaluations"] == 42
    waiting.points(1)
    assert waiting.stats()["starved_steps"] == 1  # it was there already


def test_what_is_there_is_not_waited_for(workplace: Any, opened: Any) -> None:
    workplace.fill()
    crew = opened(workplace, 2)
    for step in range(20):
        crew.points(step)
    assert crew.stats()["starved_steps"] == 0 and crew.stats()["starved_seconds"] == 0


def test_waiting_without_hope_ends_clearly(workplace: Any, opened: Any) -> None:
    with pytest.raises(UserError, match=r"shard 0 is needed.*replay.timeout=0.3 .*none was ever heard of"):
        opened(workplace, timeout=0.3).points(0)


def test_waiting_for_a_sampler_given_up_names_its_log(workplace: Any, opened: Any) -> None:
    status = {"pid": os.getpid(), "host": socket.gethostname(), "given_up": "see teacher-0.log: boom"}
    write_json(workplace.run.supervisor(0), status)
    with pytest.raises(UserError, match=r"shard 0 will not come: see teacher-0.log: boom"):
        opened(workplace).points(0)
    write_json(workplace.run.supervisor(0), status | {"pid": 2**22 + 1})  # left by a killed attempt
    worker = threading.Thread(target=lambda: (time.sleep(0.3), workplace.fill(1)))
    worker.start()
    assert opened(workplace).points(0) is not None
    worker.join()


def damage(path: Path, how: str) -> None:
    """Bytes other than those published."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    cut, swapped = data[:999], path.with_name(shard_name(0))
    {
        "flip": lambda: path.write_bytes(data),
        "cut": lambda: path.write_bytes(cut),
        "gone": path.unlink,
        "swapped": lambda: path.write_bytes(swapped.read_bytes()),
    }[how]()


@contextmanager
def filled_meanwhile(workplace: Any) -> Iterator[None]:
    """A sampler at work in a thread of its own."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            workplace.fill(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "swapped"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_corrupt_shard_is_named_counted_and_made_again_identically(
    workplace: Any, opened: Any, capfd: pytest.CaptureFixture[str], how: str, size: int
) -> None:
    workplace.fill()
    clean, before = opened(workplace), workplace.files()
    expected = [clean.points(step) for step in range(7)]
    clean.close()
    path = workplace.run.replay(2) / shard_name(1)
    damage(path, how)
    crew = opened(workplace, size)
    with filled_meanwhile(workplace):
        for step in range(7):
            points = crew.points(step)
            assert torch.equal(points.x, expected[step].x) and torch.equal(points.target, expected[step].target)
    if how != "gone":  # a sampler that starts finds that out itself
        assert crew.events() == {"corrupt_shard": 1}  # once, however many ranks complain
        assert f"{path}: corrupt shard" in capfd.readouterr().err
    assert workplace.files() == before
    assert crew.stats()["teacher_evaluations"] == 10 * 42  # the work was done twice


def test_a_shard_bad_again_and_again_ends_the_run(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    crew = opened(workplace, 2)
    path = workplace.run.replay(2) / shard_name(0)
    with pytest.raises(UserError, match=r"bad for the 11th time.*is the disk sound"):
        for _ in range(1000):
            path.write_bytes(b"x")
            crew.agree(0)
            workplace.fill(1)


@pytest.mark.parametrize(("key", "value"), [("teacher_id", "e" * 64), ("steps", 2)])
def test_what_another_request_published_is_refused_by_name_and_made_again(
    workplace: Any, opened: Any, capfd: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    workplace.fill(1)
    manifest = Manifest(workplace.run.replay(2))
    manifest.refresh()
    line = manifest.shards[0]
    sampler = line.sampler | ({key: value} if key in line.sampler else {})
    teacher = value if key == "teacher_id" else line.teacher_id
    manifest.publish(replace(line, id="forged", teacher_id=teacher, sampler=sampler))
    crew = opened(workplace)
    crew.agree(0)
    crew.main._seen()
    assert workplace.fill(1) == 1
    assert crew.points(0) is not None and crew.events() == {"foreign_shard": 1}
    notice = capfd.readouterr().err
    assert shard_name(0) in notice and ("teacher eeee" in notice or "steps=2" in notice)


def test_no_rank_acts_on_what_it_alone_sees(workplace: Any, opened: Any) -> None:
    """A rank that cannot read a shard which the others have read holds them all up; then all go on."""
    workplace.fill(1)
    crew = opened(workplace, 2)
    second = crew.ranks[1]
    pool, second.loader.pool = second.loader.pool, FilePool(Path("nowhere"))
    for _ in range(50):
        assert crew.agree(0) == 0
        second.wait(0, 0.05)
        if crew.events():
            break
    assert crew.events() == {"corrupt_shard": 1}
    second.loader.pool = pool
    assert workplace.fill(1) == 1
    assert len(crew.points(0)) == 8


def test_closing_while_loading_is_prompt(workplace: Any) -> None:
    workplace.fill(1)
    waiting = Crew(workplace)
    waiting.agree(0)
    began = time.monotonic()
    waiting.close()
    waiting.close()
    assert time.monotonic() - began < 2


def test_real_only_goes_without_and_says_so(workplace: Any, opened: Any) -> None:
    journal: list[dict[str, Any]] = []
    starved = opened(workplace, 2, on_starved=OnStarved.real_only, journal=journal.append)
    assert starved.points(0) is None
    workplace.fill(2)
    assert [starved.points(step) is None for step in range(1, 6)] == [False, False, False, True, True]
    assert [event["step"] for event in journal] == [0, 4, 5]  # positions 32 to 39 reach into shard 2
    stats = starved.stats()
    assert stats["real_only_steps"] == 3 and stats["points_used"] == 24 and stats["starved_steps"] == 3


def test_reuse_draws_on_what_is_there_up_to_its_cap(workplace: Any, opened: Any) -> None:
    journal: list[dict[str, Any]] = []
    workplace.fill(2)
    starved = opened(workplace, 2, on_starved=OnStarved.reuse, reuse_cap=3, journal=journal.append)
    fresh = [starved.points(step) for step in range(4)]  # positions 0 to 31 of 36
    again = [starved.points(step) for step in range(4, 15)]
    # Each of the 36 stored points may be used twice more: 72 points, 9 steps of 8.
    assert [part is None for part in again] == [False] * 9 + [True] * 2
    assert [event["event"] for event in journal] == ["replay_reused"] * 9 + ["replay_real_only"] * 2
    seen = Counter(tuple(x.flatten().tolist()) for part in again[:9] for x in part.x)
    assert set(seen.values()) == {2} and len(seen) == 36
    assert {tuple(x.flatten().tolist()) for part in fresh for x in part.x} <= set(seen)
    stats = starved.stats()
    assert (stats["reused_steps"], stats["real_only_steps"], stats["points_used"]) == (9, 2, 13 * 8)
    assert starved.told()["kept"] == [0, 2]
    assert opened(workplace, on_starved=OnStarved.reuse, reuse_cap=3, restored=stats).stats()["reused_points"] == {
        "0": 36,
        "1": 36,
    }


def test_a_substitute_that_one_rank_cannot_read_is_nobodys(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    crew = opened(workplace, 2, on_starved=OnStarved.reuse)
    assert crew.points(0) is not None and crew.points(1) is not None
    second = crew.ranks[1]
    second.loader._decoded.clear()
    second.loader.pool = FilePool(Path("nowhere"))
    assert crew.points(2) is None
    assert crew.stats()["real_only_steps"] == 1 and crew.ranks[1].counters["real_only_steps"] == 1


def test_a_bad_shard_is_not_read_again_for_every_step(
    workplace: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.fill(1)
    (workplace.run.replay(2) / shard_name(0)).write_bytes(b"x")
    looks: list[Path] = []

    def counted(path: Path, size: int) -> bytes:
        looks.append(path)
        return read_offered(path, size)

    monkeypatch.setattr(transport, "read_offered", counted)
    crew = opened(workplace)
    crew.agree(0)  # offers the shard to two steps
    while not crew.events():
        crew.agree(0)
        crew.main.wait(0, 0.01)
    assert len(looks) == reader.LOOKS


def test_a_load_that_fails_between_two_looks_is_not_ready(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    loader = opened(workplace).main.loader

    class Late(Future[Any]):
        """Done, with a failure, from the second look on."""

        looks = 0

        def done(self) -> bool:
            self.looks += 1
            if self.looks == 2:
                self.set_exception(BadShard(Offer(0, 1, 1, 1), "late"))
            return self.looks > 1

    loader._steps[0] = Late()
    assert loader.ready_until(0) == 0
    assert loader.ready_until(0) == 0 and [bad.reason for bad in loader.found_bad] == ["late"]


def test_a_kept_shard_that_is_damaged_is_named_and_others_stand_in(workplace: Any, opened: Any) -> None:
    workplace.fill(2)
    crew = opened(workplace, 2, on_starved=OnStarved.reuse, reuse_cap=2)
    for step in range(4):  # positions 0 to 31 of 36
        assert crew.points(step) is not None
    damage(workplace.run.replay(2) / shard_name(1), "flip")
    for rank in crew.ranks:
        rank.loader._decoded.clear()
    assert crew.points(4) is None and crew.events() == {"corrupt_shard": 1}
    assert crew.points(5) is not None  # from shard 0
    assert crew.stats()["reused_steps"] == 1


def test_a_substitute_does_not_outlive_its_step(workplace: Any, opened: Any) -> None:
    workplace.fill(1)
    crew = opened(workplace, on_starved=OnStarved.reuse)
    assert crew.points(0) is not None and crew.points(1) is not None
    assert crew.agree(2) == 2  # starved: a substitute is being loaded
    assert crew.main._substitute is not None
    workplace.fill()
    rows = [crew.main.words(2)]
    rows[0][pool_source.READY] = 3  # meanwhile the step's own points came
    assert crew.main.heed(2, rows) == 3
    assert crew.main._substitute is None


def test_fail_waits_for_the_first_shard_only(workplace: Any, opened: Any) -> None:
    failing = opened(workplace, 2, on_starved=OnStarved.fail)
    worker = threading.Thread(target=lambda: (time.sleep(0.3), workplace.fill(1)))
    worker.start()
    assert failing.points(0) is not None and failing.points(1) is not None
    worker.join()
    with pytest.raises(UserError, match=r"starved at step 2, shards 0 to 1 .*replay.on_starved=fail"):
        failing.points(2)
    rows = [rank.words(2) for rank in failing.ranks]
    with pytest.raises(ToldElsewhere):
        failing.ranks[1].heed(2, rows)


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
    assert not short.main.loader._steps


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
    for step in range(11):
        alone.points(step)
    alone.main.release(10)
    assert disk.refused and not workplace.run.replay_progress(2).exists()
    disk.code = 0
    for _ in range(3):
        alone.told()
    assert alone.told() == {"released": workplace.request.shard_of(80) - 1, "kept": [0, 0], "used": 4}


def test_other_errors_of_the_disk_end_the_run(workplace: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.fill(1)
    monkeypatch.setattr(pool_source, "write_json", FullDisk(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        for step in range(2):
            opened(workplace).points(step)
