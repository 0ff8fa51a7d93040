"""Faults of a sampler's surroundings: short memory, a full disk, damaged files. What it makes stays the same."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import Retirement
from trainer.errors import ConfigError
from trainer.replay import sidecar
from trainer.replay.decode import shard_name
from trainer.replay.events import count_events, read_events
from trainer.replay.manifest import Manifest
from trainer.replay.memory import is_out_of_memory
from trainer.replay.pool import discard
from trainer.replay.request import estimate, plan_request, pools_disk_bytes
from trainer.replay.state import read_json, write_json
from trainer.replay.trajectory import sample_trajectories


class Memory:
    """`sample_trajectories` on a device that holds so many trajectories at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.sizes = room, list[int]()
        monkeypatch.setattr(sidecar, "sample_trajectories", self.sample)

    def sample(self, model: Any, schedule: Any, request: Any, indices: Any, *rest: Any) -> Any:
        self.sizes.append(len(indices))
        if len(indices) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
        return sample_trajectories(model, schedule, request, indices, *rest)


def manifest_of(workplace: Any) -> Manifest:
    manifest = Manifest(workplace.run.replay(2))
    manifest.refresh()
    return manifest


def hashes(workplace: Any) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in workplace.files().items()}


def test_out_of_memory_halves_the_micro_batch_and_goes_on(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    memory = Memory(monkeypatch, room=2)
    freed: list[torch.device] = []
    monkeypatch.setattr(sidecar, "free_memory", freed.append)
    assert workplace.fill(2) == 2
    assert memory.sizes == [4, 2, 2, 2, 2, 2, 2] and freed == [torch.device("cpu")]
    lines = manifest_of(workplace).shards
    assert [lines[shard].micro_batch for shard in (0, 1)] == [2, 2]
    assert lines[0].sampler == workplace.request.sampler()
    event = read_events(workplace.run)[0]
    assert event["event"] == "out_of_memory" and (event["shard"], event["worker"]) == (0, 0)
    assert (event["micro_batch"], event["next_micro_batch"]) == (4, 2)
    assert event["reason"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert count_events(workplace.run)["out_of_memory"] == 1
    assert capfd.readouterr().err.count("out of memory with 4 trajectories at once; going on with 2") == 1
    memory.sizes.clear()
    assert workplace.fill(1) == 1 and memory.sizes == [2, 2, 2]  # another sampler, started again


def test_a_shard_made_again_has_the_same_bytes_however_memory_was(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.fill(1)  # with 4 at once
    memory = Memory(monkeypatch, room=3)
    workplace.fill(1)  # with 2
    memory.room = 4
    before, manifest = hashes(workplace), manifest_of(workplace)
    for shard in (0, 1):
        path = workplace.run.replay(2) / shard_name(shard)
        path.write_bytes(path.read_bytes()[:1000])
        manifest.redo(shard, manifest.shards[shard].id, "cut off")
    memory.sizes.clear()
    assert workplace.fill(2) == 2
    assert memory.sizes == [4, 2, 2, 2, 2] and hashes(workplace) == before
    assert all(line.sha256 == before[line.name] for line in manifest_of(workplace).shards.values())


def test_one_trajectory_that_does_not_fit_is_the_end(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        workplace.fill(1)
    assert memory.sizes == [4, 2, 1] and count_events(workplace.run)["out_of_memory"] == 2


def test_other_errors_are_not_taken_for_short_memory(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sidecar, "sample_trajectories", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        workplace.fill(1)
    assert count_events(workplace.run)["out_of_memory"] == 0


def test_what_the_allocators_say() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 58, dtype=np.int8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(OSError(errno.ENOMEM, "out of memory"))


def test_every_evaluation_is_a_sign_of_life(workplace: Any) -> None:
    signs: list[None] = []
    sampler = workplace.sampler()
    sampler.alive = lambda: signs.append(None)
    request = sampler.current_request()
    sampler.make_shard(request, 0)
    assert len(signs) >= 2 * 7  # two micro-batches of 4 steps and 3 labels
    assert read_json(workplace.run.sampler(0))["status"] == "sampling"


def test_heartbeats_are_written_now_and_then_and_when_there_are_news(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(sidecar, "write_json", lambda path, content: written.append(content["status"]))
    sampler = workplace.sampler()
    for status in ("waiting", "waiting", "sampling", "sampling", "waiting"):
        sampler.beat(status)
    assert written == ["waiting", "sampling", "waiting"]
    sampler.beat("waiting", news=True)
    monkeypatch.setattr(sidecar, "BEAT_SECONDS", 0.0)
    sampler.beat("waiting")
    assert len(written) == 5


def test_a_disk_full_for_everything_kills_nothing_and_is_noted_once_there_is_room(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.replay import events

    sampler, tries, full = workplace.sampler(), [0], [True]
    request = sampler.current_request()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait(seconds: float) -> bool:
        tries[0] += 1
        if tries[0] == 3:
            monkeypatch.undo()
            full[0] = False
        return False

    signs: list[bool] = []
    sampler.alive = lambda: signs.append(full[0])
    for module, name in ((sidecar, "write_json"), (sidecar, "publish"), (events, "append_line")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(sampler.stop, "wait", wait)
    sampler.make_shard(request, 0)
    assert tries == [3] and sampler.made == 1 and count_events(workplace.run)["disk_full"] == 1
    assert sum(signs) >= 3 + 14  # while it waited, too
    assert read_json(workplace.run.sampler(0))["shards"] == 1


def test_a_line_damaged_after_it_was_read_is_written_anew(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that starts now does not see the line; the sampler, which saw it once, must look again."""
    sampler = workplace.sampler()
    request = sampler.current_request()
    while (shard := sampler.next_shard(request)) is not None:
        sampler.make_shard(request, shard)
    before, path = hashes(workplace), workplace.run.replay(2) / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b'"shard":4', b'"shard":5')
    path.write_bytes(b"\n".join(lines))
    assert 4 not in manifest_of(workplace).shards and sampler.next_shard(request) is None
    sampler._rest(request)
    assert sampler.next_shard(request) is None  # not every moment
    monkeypatch.setattr(sidecar, "REREAD_SECONDS", 0.0)
    sampler._rest(request)
    assert sampler.next_shard(request) == 4
    sampler.make_shard(request, 4)
    assert hashes(workplace) == before and manifest_of(workplace).shards.keys() == set(range(9))


@pytest.mark.parametrize("left", [0, 1300])
def test_a_manifest_that_lost_its_lines_is_made_good(workplace: Any, left: int) -> None:
    workplace.fill(4)
    before, path = hashes(workplace), workplace.run.replay(2) / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:left])
    workplace.fill(4)
    assert manifest_of(workplace).shards.keys() >= {0, 1, 2, 3}
    assert {name: digest for name, digest in hashes(workplace).items() if name in before} == before


def test_files_that_nobody_listed_count_against_the_limit(workplace: Any) -> None:
    workplace.config.replay.pool_gb = 6.5 * workplace.request.shard_bytes / 1e9
    workplace.ask()
    workplace.fill()
    sampler = workplace.sampler(0, 2)  # odd shards are another's: it will not tidy them
    (workplace.run.replay(2) / "manifest.jsonl").unlink()
    write_json(workplace.run.replay_progress(2), {"released": 4, "kept": [0, 0], "used": 5})
    while (shard := sampler.next_shard(request := sampler.current_request())) is not None:
        sampler.make_shard(request, shard)
        assert len(workplace.files()) <= 6
    assert shard_name(6) in workplace.files() and shard_name(1) not in workplace.files()


def test_a_high_mark_below_what_a_few_steps_need_is_refused(workplace: Any) -> None:
    config = workplace.config
    config.replay.pool_shards = 3
    with pytest.raises(ConfigError, match=r"replay\.pool_shards=3: 4 are needed"):
        plan_request(config, 2, [1], 20)
    config.replay.pool_shards = 4
    assert plan_request(config, 2, [1], 20).pool_shards == 4


def test_retirement_deletes_or_keeps_and_is_accounted_for(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace()
    workplace.fill(3)
    kept = workplace.files()
    discard(workplace.run, 2, Retirement.keep)
    assert workplace.files() == kept and workplace.fill() == 0
    assert manifest_of(workplace).shards.keys() == {0, 1, 2}
    discard(workplace.run, 2, Retirement.delete)
    assert not workplace.files() and manifest_of(workplace).retired == 3
    config = workplace.config
    config.data.tasks = [[0, 1], [2, 3], [4, 5]]
    one = estimate(plan_request(config, 3, [0, 1, 2, 3], 20))["disk_bytes"]
    assert pools_disk_bytes(config) == one > 0
    config.replay.retirement = Retirement.keep
    assert pools_disk_bytes(config) == 2 * one
