"""The pool in a store behaves as the pool of files does: published whole, checked, made again, given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from crew import Crew

from trainer.config import Retirement
from trainer.data.cache import Cache
from trainer.errors import UserError
from trainer.replay import sidecar, transport
from trainer.replay.manifest import Manifest, publications
from trainer.replay.pool import discard
from trainer.replay.transport import open_pool, pool_url

STORE = "memory://pools/prefix"


@pytest.fixture
def stored(make_workplace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(transport, "LISTED_EVERY", 0.0)
    yield make_workplace("run", store=STORE)
    monkeypatch.undo()
    if fsspec.filesystem("memory").exists("/pools"):
        fsspec.filesystem("memory").rm("/pools", recursive=True)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    crews: list[Crew] = []

    def make(workplace: Any, size: int = 1, **options: Any) -> Crew:
        cache = partial(Cache, tmp_path / "cache", 10**7, 5.0) if workplace.request.store else None
        crews.append(Crew(workplace, size, cache=cache, **options))
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()


def objects(workplace: Any) -> dict[str, bytes]:
    """By their names within the pool."""
    place = pool_url(workplace.request, workplace.run).removeprefix("memory:/")
    system = fsspec.filesystem("memory")
    return {name.removeprefix(f"{place}/"): system.cat_file(name) for name in system.find(place)}


def place_of(workplace: Any, name: str) -> str:
    return f"{pool_url(workplace.request, workplace.run).removeprefix('memory:/')}/{name}"


def shards(workplace: Any) -> dict[str, bytes]:
    return {name.removeprefix("shards/"): data for name, data in objects(workplace).items() if name.endswith(".tar")}


def manifest(workplace: Any) -> Manifest:
    view = Manifest(open_pool(workplace.run, workplace.request).open_journal())
    view.refresh()
    return view


def test_shards_and_points_are_those_of_files(
    stored: Any, make_workplace: Callable[..., Any], opened: Callable[..., Crew]
) -> None:
    files = make_workplace("files")
    files.fill(3)
    stored.fill(3)
    assert shards(stored) == files.files()
    mine, other = opened(stored, 2), opened(files, 2)
    for step in range(5):
        a, b = mine.points(step), other.points(step)
        assert torch.equal(a.x, b.x) and torch.equal(a.target, b.target) and torch.equal(a.label, b.label)
    assert not list(stored.run.replay(2).glob("*.tar")), "nothing lies in the run directory"


@pytest.mark.parametrize("how", ["flip", "gone", "cut"])
def test_a_bad_object_is_named_counted_and_made_again(
    stored: Any, opened: Callable[..., Crew], how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stored.fill(1)
    good, name = shards(stored)["replay-000000.tar"], place_of(stored, "shards/replay-000000.tar")
    system = fsspec.filesystem("memory")
    if how == "gone":
        system.rm_file(name)
    else:
        system.pipe_file(name, good[:-1024] if how == "cut" else good[:700] + bytes([good[700] ^ 1]) + good[701:])
    crew = opened(stored, 2)
    while not crew.events():
        crew.agree(0)
        crew.main.wait(0, 0.01)
    assert crew.events() == {"corrupt_shard": 1}
    assert "replay-000000.tar: corrupt shard" in capfd.readouterr().err
    assert stored.fill(1) == 1 and shards(stored)["replay-000000.tar"] == good
    assert len(crew.points(0)) == 8


def test_a_damaged_cached_shard_is_fetched_again(stored: Any, opened: Callable[..., Crew], tmp_path: Path) -> None:
    stored.fill(1)
    expected = opened(stored).points(0)
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    crew = opened(stored)
    assert torch.equal(crew.points(0).x, expected.x) and not crew.events()


def test_killed_between_shard_and_line(stored: Any) -> None:
    """The object without a line is nobody's: a sampler that starts removes and makes it again."""
    stored.fill(2)
    lines = sorted(name for name in objects(stored) if name.startswith("manifest/"))
    fsspec.filesystem("memory").rm_file(place_of(stored, lines[1]))
    assert set(manifest(stored).shards) == {0}
    sampler = stored.sampler()
    request = sampler.current_request()
    assert sampler.next_shard(request) == 1 and set(shards(stored)) == {"replay-000000.tar"}
    sampler.make_shard(request, 1)
    assert set(manifest(stored).shards) == {0, 1} and len(shards(stored)) == 2


def test_a_line_without_its_shard_is_taken_back(stored: Any) -> None:
    stored.fill(2)
    fsspec.filesystem("memory").rm_file(place_of(stored, "shards/replay-000000.tar"))
    sampler = stored.sampler()
    assert sampler.next_shard(sampler.current_request()) == 0
    assert manifest(stored).retired == 1


def test_lines_are_understood_in_whatever_order_they_are_listed(stored: Any) -> None:
    stored.fill(2)
    view = manifest(stored)
    view.redo(0, view.shards[0].id, "test")
    lines = sorted(name for name in objects(stored) if name.startswith("manifest/"))
    system = fsspec.filesystem("memory")
    late = system.cat_file(place_of(stored, lines[-1]))
    system.rm_file(place_of(stored, lines[-1]))
    system.pipe_file(place_of(stored, "manifest/00000000000000000001-0"), late)  # by a clock that is behind
    assert set(manifest(stored).shards) == {1}


def test_a_torn_or_foreign_line_counts_as_never_written(stored: Any) -> None:
    stored.fill(1)
    fsspec.filesystem("memory").pipe_file(place_of(stored, "manifest/99999999999999999999-0"), b'{"id":"12')
    assert set(manifest(stored).shards) == {0}


def test_only_what_is_new_is_read(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.fill(3)
    journal = open_pool(stored.run, stored.request).open_journal()
    read: list[str] = []
    own = journal._store.read
    monkeypatch.setattr(journal._store, "read", lambda name: read.append(name) or own(name))
    assert len(journal.read()[1]) == 3 and len(read) == 3
    assert journal.read() == (False, []) and len(read) == 3
    journal.append(b"mine")
    assert journal.read() == (False, [b"mine"]) and journal.read() == (False, []) and len(read) == 3


def test_the_pool_of_a_learnt_task_goes_and_its_record_stays(stored: Any) -> None:
    made = stored.fill()
    assert made == stored.request.shards
    discard(stored.run, 2, Retirement.keep)
    assert len(shards(stored)) == made
    discard(stored.run, 2, Retirement.delete)
    assert not shards(stored) and not manifest(stored).shards
    assert len(publications(open_pool(stored.run, stored.request).open_journal())) == made


def test_backpressure(make_workplace: Callable[..., Any], stored: Any) -> None:
    """No more lies in the store than `replay.pool_gb` allows; what was used makes room."""
    limit = 6
    small = make_workplace("small", store=STORE, pool_gb=(limit + 0.5) * stored.request.shard_bytes / 1e9)
    assert small.request.capacity == limit and small.fill() == limit
    assert len(shards(small)) == limit


def test_a_store_that_is_away_is_waited_for_and_counted(
    stored: Any, opened: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stored.fill(2)
    crew = opened(stored)
    assert crew.points(0) is not None
    system = type(fsspec.filesystem("memory"))
    real, until = system.find, time.monotonic() + 3.0
    real_read = system.cat_file

    def find(self: Any, *arguments: Any, **options: Any) -> Any:
        if time.monotonic() < until:
            raise OSError("connection refused")
        return real(self, *arguments, **options)

    def cat_file(self: Any, *arguments: Any, **options: Any) -> Any:
        if time.monotonic() < until:
            raise OSError("connection refused")
        return real_read(self, *arguments, **options)

    monkeypatch.setattr(system, "find", find)
    monkeypatch.setattr(system, "cat_file", cat_file)
    for step in range(1, 4):  # positions to 31: the second shard is not here yet
        assert crew.points(step) is not None
    while time.monotonic() < until or crew.main.watch.pool.away:
        assert crew.agree(4) == 4
        crew.main.wait(4, 0.05)
    assert stored.fill(1) == 1 and crew.points(4) is not None
    said = capfd.readouterr().err.splitlines()
    assert sum("trying again" in line for line in said) == 1 and sum("answers again" in line for line in said) == 1
    assert crew.events() == {"store_away": 1}
    assert crew.stats()["starved_seconds"] > 0.5


def test_a_store_that_stays_away_ends_the_run_with_its_name(
    make_workplace: Callable[..., Any], opened: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = make_workplace("run", store=STORE)
    workplace.config.data.store_timeout = 1.5
    workplace.request = workplace.ask()
    crew = opened(workplace)

    def find(self: Any, *arguments: Any, **options: Any) -> Any:
        raise OSError("connection refused")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", find)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^memory://pools/prefix/run/task-02-.*connection refused.*store_timeout=1.5"):
        while time.monotonic() < began + 20:
            crew.agree(0)
            time.sleep(0.05)


def test_a_sampler_that_is_told_to_stop_does_not_wait_for_the_store(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: Any, *arguments: Any, **options: Any) -> Any:
        raise OSError("connection refused")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", find)
    sampler = stored.sampler()
    beats: list[str] = []
    monkeypatch.setattr(sampler, "beat", lambda status, **_: beats.append(status) or sampler.stop.set())
    sampler.serve()
    assert beats == ["waiting for the store", "ended"]


def test_positions_and_shards_do_not_depend_on_the_place(stored: Any) -> None:
    assert "store" not in stored.request.sampler() and np.isfinite(stored.request.store_timeout)


def test_a_full_pool_that_is_read_anew_is_left_as_it_is(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = stored.sampler()
    request = sampler.current_request()
    while (shard := sampler.next_shard(request)) is not None:
        sampler.make_shard(request, shard)
    before = objects(stored)
    monkeypatch.setattr(sidecar, "REREAD_SECONDS", -1.0)
    sampler._rest(request)
    assert sampler.next_shard(request) is None and objects(stored) == before
