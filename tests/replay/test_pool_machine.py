"""Any interleaving of sampling, crashes, damage, reading, restarts and changes of the world: never a wrong point.

The samplers and the ranks are the real ones; only the teacher is replaced by a table of random numbers.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from crew import CPU, Crew
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trainer.config import Config
from trainer.data import shards
from trainer.replay import pool_source, reader
from trainer.replay.decode import shard_name
from trainer.replay.drawn import Made
from trainer.replay.draws import draws
from trainer.replay.request import ReplayRequest, plan_request, write_request
from trainer.replay.sidecar import Sampler
from trainer.replay.state import write_state
from trainer.replay.trajectory import TrajectoryBatch
from trainer.run import RunDir

STEPS, CHECKPOINT_STEPS, BATCH, CAPACITY = 24, 4, 4, 6
MEMORY = Path("/dev/shm")  # nothing here has to reach a disk


class Crash(BaseException):
    """The sampler dies here."""


class TableSampler(Sampler):
    """A sampler whose teacher is a table: trajectory i always has the same numbers."""

    def _maker(self, request: ReplayRequest, shard: int) -> Any:
        first = shard * request.shard_trajectories
        indices = np.arange(first, first + request.shard_trajectories, dtype=np.int64)
        return lambda micro_batch: Made([table(request, indices)]), []


def table(request: ReplayRequest, indices: np.ndarray[Any, Any]) -> TrajectoryBatch:
    rows = [np.random.default_rng(int(index)) for index in indices]
    points = (request.points_per_trajectory, *request.image_shape)

    def half(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(np.stack([row.standard_normal(shape) for row in rows]), dtype=torch.float16)

    def whole(shape: tuple[int, ...], high: int) -> torch.Tensor:
        return torch.tensor(np.stack([row.integers(0, high, shape) for row in rows]))

    return TrajectoryBatch(
        indices=indices,
        label=whole((), 3),
        start_seeds=whole((), 2**62),
        t=whole(points[:1], request.timesteps),
        seeds=whole(points[:1], 2**62),
        end=half(request.image_shape),
        states=None,
        targets=half(points),
        evaluations=1,
    )


def tiny_request() -> ReplayRequest:
    """12 shards of 4 trajectories with 2 points: 2 steps each; room for 6."""
    config = Config()
    config.data.image_size, config.data.channels = 12, 1
    config.train.global_batch, config.train.images_per_task = BATCH, BATCH * STEPS
    config.checkpoint.every_images = BATCH * CHECKPOINT_STEPS
    config.replay.points_per_trajectory, config.replay.shard_trajectories = 2, 4
    size = plan_request(config, 2, [0, 1, 2], STEPS).shard_bytes
    config.replay.pool_gb = (CAPACITY + 0.5) * size / 1e9
    return plan_request(config, 2, [0, 1, 2], STEPS)


def last_byte_of_an_array(data: bytearray, place: float) -> int:
    """Where a changed bit leaves a tar that can be read: only a checksum tells. Any byte where there is no tar."""
    with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        arrays = [member for member in tar if member.name.endswith("targets.npy")]
        if arrays:
            member = arrays[int(place * len(arrays))]
            return member.offset_data + member.size - 1
    return int(place * len(data))


class PoolMachine(RuleBasedStateMachine):
    """What the trainer reads is always what the teacher says, and in the end it has read everything."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None)
        self.run, self.request = RunDir(Path(self.folder.name)), tiny_request()
        self.config = Config()
        write_request(self.run, self.request)
        write_state(self.run, 2)
        self.expected = table(self.request, np.arange(48))
        self.step = self.saved = 0
        self.saved_stats: dict[str, Any] = {}
        self.crew = Crew(self, 1, batch=BATCH, prefetch=1)
        self.start_samplers(1)

    # --- samplers ------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def start_samplers(self, count: int) -> None:
        self.samplers = [TableSampler(self.run, worker, count, CPU) for worker in range(count)]

    @rule(turns=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def sample(self, turns: list[int]) -> None:
        for turn in turns:
            self.make(self.samplers[turn % len(self.samplers)])

    def make(self, sampler: TableSampler) -> bool:
        request = sampler.current_request()
        assert request is not None
        shard = sampler.next_shard(request)
        if shard is not None:
            sampler.make_shard(request, shard)
        return shard is not None

    @rule(place=st.sampled_from(["before the tar", "within the tar", "before the line", "within the line"]))
    def crash_while_publishing(self, place: str) -> None:
        def no_tar(path: Path, data: bytes) -> None:
            if path.suffix == ".tar":
                if place == "within the tar":
                    path.with_name(f".{path.name}.77.tmp").write_bytes(data[: len(data) // 2])
                raise Crash
            shards.write_atomic(path, data)

        def no_line(path: Path, line: bytes) -> None:
            if path.name == "manifest.jsonl" and b'"event"' not in line:
                if place == "within the line":
                    with path.open("ab") as file:
                        file.write(b'{"id":"12')
                raise Crash
            shards.append_line(path, line)

        target, stand_in = ("append_line", no_line) if "line" in place else ("write_atomic", no_tar)
        with suppress(Crash), patch(f"trainer.replay.transport.{target}", stand_in):
            self.make(self.samplers[0])
        self.start_samplers(len(self.samplers))

    # --- damage --------------------------------------------------------------------------------------------------

    @rule(ahead=st.integers(0, 3), how=st.sampled_from(["flip", "cut", "gone", "swap"]), place=st.floats(0, 0.99))
    def damage_a_shard(self, ahead: int, how: str, place: float) -> None:
        """One that the trainer needs soon."""
        path = self.run.replay(2) / shard_name(self.step * BATCH // self.request.shard_uses + ahead)
        others = sorted(self.run.replay(2).glob("replay-*.tar"))
        if path not in others:
            return
        data = bytearray(path.read_bytes())
        if how == "gone":
            path.unlink()
        elif how == "swap":
            path.write_bytes(others[0].read_bytes())
        elif how == "cut":
            path.write_bytes(data[: int(place * len(data))])
        elif data:  # else it was cut to nothing before
            data[last_byte_of_an_array(data, place)] ^= 4
            path.write_bytes(data)

    @rule(how=st.sampled_from(["flip", "cut"]), place=st.floats(0, 0.99))
    def damage_the_manifest(self, how: str, place: float) -> None:
        path = self.run.replay(2) / "manifest.jsonl"
        data = bytearray(path.read_bytes() if path.exists() else b"")
        where = int(place * len(data))
        if not data:
            return
        if how == "cut":
            path.write_bytes(data[:where])
        else:
            data[where] ^= 4
            path.write_bytes(data)
        self.start_samplers(len(self.samplers))  # the fault is found by who reads the file anew

    # --- the trainer ---------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 8))
    def train(self, count: int) -> None:
        for _ in range(min(count, STEPS - self.step)):
            if not self.train_one():
                return

    def train_one(self) -> bool:
        for _ in range(8):
            if self.crew.agree(self.step) > self.step:
                break
            for rank in self.crew.ranks:
                rank.wait(self.step, 0.002)
        else:
            return False
        points = [rank.points(self.step) for rank in self.crew.ranks]
        _, trajectory, point = draws(self.request, self.step * BATCH, (self.step + 1) * BATCH)
        target = torch.cat([part.target for part in points])  # type: ignore[union-attr]
        assert torch.equal(target, self.expected.targets[trajectory, point].float())  # type: ignore[index]
        assert torch.equal(torch.cat([part.t for part in points]), self.expected.t[trajectory, point])  # type: ignore[union-attr]
        self.step += 1
        if self.step % CHECKPOINT_STEPS == 0:
            self.checkpoint()
        return True

    def checkpoint(self) -> None:
        self.saved, self.saved_stats = self.step, self.crew.stats()
        self.crew.main.release(self.step)

    @rule(size=st.sampled_from([1, 2, 4]))
    @precondition(lambda self: self.step < STEPS)
    def restart_the_trainer(self, size: int) -> None:
        self.crew.close()
        self.step = self.saved
        self.crew = Crew(self, size, batch=BATCH, prefetch=1, start_step=self.step, restored=self.saved_stats)

    @rule(size=st.sampled_from([1, 2]), how=st.sampled_from(["flip", "swap"]), place=st.floats(0, 0.99))
    @precondition(lambda self: self.step < STEPS)
    def restart_onto_damage(self, size: int, how: str, place: float) -> None:
        """What is in no rank's memory and has changed on the disk."""
        self.restart_the_trainer(size)
        self.damage_a_shard(0, how, place)
        self.train(2)

    @invariant()
    def the_pool_stays_below_its_limit(self) -> None:
        present = [path.stat().st_size for path in self.run.replay(2).glob("replay-*.tar")]
        assert sum(present) <= self.request.pool_bytes

    def teardown(self) -> None:
        if not hasattr(self, "crew"):
            return
        for _ in range(300):
            if self.step == STEPS:
                break
            for sampler in self.samplers:
                self.make(sampler)
            self.train_one()
        assert self.step == STEPS, "somebody waits for ever"
        assert self.crew.stats()["points_used"] == STEPS * BATCH
        self.crew.close()
        self.folder.cleanup()


@pytest.fixture(autouse=True)
def no_patience_and_no_foresight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(pool_source, "LONGEST_INTERVAL", 1)  # what is not read ahead can still be damaged
    monkeypatch.setattr(reader, "DECODED_SHARDS", 1)


def options(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_no_interleaving_gives_a_wrong_point() -> None:
    run_state_machine_as_test(PoolMachine, settings=options(15))


@pytest.mark.slow
def test_no_interleaving_of_many_gives_a_wrong_point() -> None:
    run_state_machine_as_test(PoolMachine, settings=options(150))
