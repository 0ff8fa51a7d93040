"""The cache of a node: bounded, shared by processes, and never taken from under a reader."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.data.cache import Cache, Wanted
from trainer.errors import UserError


def wanted(key: str, content: bytes, asked: list[str] | None = None, check: bool = False) -> Wanted:
    def fill(write: Callable[[bytes], object]) -> None:
        if asked is not None:
            asked.append(key)
        write(content)

    def problem(descriptor: int) -> str:
        return "" if os.pread(descriptor, 100, 0) == content else "corrupt"

    return Wanted(key, len(content), fill, problem if check else None)


def read(cache: Cache, item: Wanted) -> bytes:
    with cache.opened(item) as descriptor:
        return os.pread(descriptor, 1000, 0)


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.directory / "shards").iterdir())


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    asked: list[str] = []
    for _ in range(2):  # two processes' views
        cache = Cache(tmp_path, 100, 5.0)
        assert [read(cache, wanted("a", b"12345", asked)) for _ in range(3)] == [b"12345"] * 3
    assert asked == ["a"] and names(cache) == ["a"]


def test_what_was_used_longest_ago_goes_first_and_never_what_is_open(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10, 0.5)
    for age, key in enumerate("ab"):
        read(cache, wanted(key, b"1234"))
        os.utime(tmp_path / "shards" / key, (1000 + age, 1000 + age))
    with cache.opened(wanted("a", b"1234")) as descriptor:
        os.utime(tmp_path / "shards" / "a", (900, 900))
        read(cache, wanted("c", b"1234"))
        assert names(cache) == ["a", "c"] and cache.bytes <= 10
        full = pytest.raises(UserError, match=r"full of files that are in use.*data\.cache_gb")
        with full, cache.opened(wanted("c", b"1234")):
            read(cache, wanted("d", b"1234"))
        assert os.pread(descriptor, 10, 0) == b"1234"
    read(cache, wanted("d", b"1234"))
    assert names(cache) == ["c", "d"]


def test_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    asked: list[str] = []
    read(Cache(tmp_path, 100, 5.0), wanted("a", b"12345", asked, check=True))
    for damage in (b"1234", b"12x45"):
        (tmp_path / "shards" / "a").write_bytes(damage)
        assert read(Cache(tmp_path, 100, 5.0), wanted("a", b"12345", asked, check=True)) == b"12345"
    assert asked == ["a"] * 3


def test_a_source_that_is_always_damaged_ends(tmp_path: Path) -> None:
    bad = Wanted("a", 5, lambda write: write(b"xxxxx"), lambda descriptor: "corrupt")
    with pytest.raises(UserError, match="corrupt"):
        read(Cache(tmp_path, 100, 5.0), bad)


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10, 5.0)
    (tmp_path / "shards" / ".dead.1-1").write_bytes(b"123456")
    alive = tmp_path / "shards" / ".alive.2-2"
    alive.write_bytes(b"1234")
    with alive.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        read(cache, wanted("a", b"12345"))
        assert names(cache) == [".alive.2-2", "a"]


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fill(write: Callable[[bytes], object]) -> None:
        write(b"12")
        raise UserError("store: gone")

    cache = Cache(tmp_path, 10, 5.0)
    with pytest.raises(UserError, match="gone"):
        read(cache, Wanted("a", 5, fill))
    assert names(cache) == []


def _fetch(directory: Path, log: Path) -> None:
    def fill(write: Callable[[bytes], object]) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)
        write(b"12345")

    assert read(Cache(directory, 100, 30.0), Wanted("a", 5, fill)) == b"12345"


def test_processes_fetch_an_object_once_between_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=_fetch, args=(tmp_path / "cache", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and log.read_text() == "fetched\n"


def test_readers_under_constant_eviction_read_what_they_asked_for(tmp_path: Path) -> None:
    contents = {f"k{number}": bytes([number]) * 4 for number in range(6)}
    cache, wrong = Cache(tmp_path, 12, 30.0), list[str]()

    def work(start: int) -> None:
        for turn in range(60):
            key = f"k{(start + turn * (start + 1)) % 6}"
            if read(cache, wanted(key, contents[key])) != contents[key]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and cache.bytes <= 12


def test_an_object_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit.*data\.cache_gb"):
        read(Cache(tmp_path, 4, 5.0), wanted("a", b"12345"))
