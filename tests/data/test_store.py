"""Requests to a store: what passes is tried again within a time limit, what does not is one line at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from trainer import store as module
from trainer.errors import ConfigError, UserError
from trainer.store import Damaged, Interrupted, Missing, ObjectStore, Outage, Patience, check_url

SOON = Patience(timeout=5.0, request=1.0)


class Faulty:
    """fsspec's memory, whose requests go wrong as `faults` says, one after another; None: all is well."""

    async_impl = False

    def __init__(self, faults: list[Any]) -> None:
        self.real, self.faults, self.asked = fsspec.filesystem("memory"), faults, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name not in ("cat_file", "pipe_file", "find", "rm_file", "info"):
            return found

        def asked(*arguments: Any, **options: Any) -> Any:
            self.asked += 1
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, BaseException):
                raise fault
            answer = found(*arguments, **options)
            return fault(answer) if callable(fault) else answer

        return asked


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Faulty]]:
    """Makes the memory of the next store a faulty one. What was stored goes afterwards."""

    def install(*faults: Any) -> Faulty:
        system = Faulty(list(faults))
        monkeypatch.setattr(module, "_open", lambda scheme, patience: system)
        return system

    yield install
    fsspec.filesystem("memory").rm("/bucket", recursive=True) if fsspec.filesystem("memory").exists("/bucket") else None


def test_objects_come_back_as_they_went(faults: Callable[..., Faulty]) -> None:
    faults()
    store = ObjectStore("memory://bucket/x/", SOON)
    store.write("a/one", b"1")
    store.write("a/b/two", b"22")
    assert store.read("a/one") == b"1" and store.sizes("a") == {"one": 1, "b/two": 2} and store.sizes("c") == {}
    store.delete("a/one")
    store.delete("a/one")
    with pytest.raises(Missing, match=r"memory://bucket/x/a/one: missing"):
        store.read("a/one")


def test_what_passes_is_tried_again_and_said_only_when_it_lasts(faults: Callable[..., Faulty]) -> None:
    told: list[str] = []
    system = faults(OSError("reset"), TimeoutError(), None)
    store = ObjectStore("memory://bucket", SOON, outage=Outage(told.append))
    store.write("one", b"1")
    assert system.asked == 3 and not told


@pytest.mark.parametrize("jitter", [0.5, 1.0])
def test_a_store_that_stays_away_ends_in_time_with_one_line(
    faults: Callable[..., Faulty], monkeypatch: pytest.MonkeyPatch, jitter: float
) -> None:
    told: list[str] = []
    pauses: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(pauses)))
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda low, high: jitter))

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return False

    system = faults(*[OSError("connection refused")] * 1000)
    store = ObjectStore("memory://bucket", Patience(60.0, 1.0), pause=pause, outage=Outage(told.append))
    with pytest.raises(
        UserError, match=r"^memory://bucket/one: .*for 60 seconds.*connection refused.*store_timeout=60"
    ):
        store.read("one")
    doubling = [jitter * min(0.2 * 2**number, 10.0) for number in range(len(pauses) - 1)]
    assert pauses[:-1] == pytest.approx(doubling) and sum(pauses) == pytest.approx(60.0)
    assert system.asked == len(pauses) + 1  # the last time at the limit itself
    assert len(told) == 1 and "trying again" in told[0] and store.outage.now


def test_its_return_is_said_with_the_seconds(faults: Callable[..., Faulty]) -> None:
    told: list[str] = []
    ended: list[float] = []
    system = faults()
    outage = Outage(told.append)
    outage.ended = ended.append
    store = ObjectStore("memory://bucket", SOON, outage=outage)
    store.write("one", b"1")
    began = time.monotonic()
    system.faults = [OSError("gone")] * 5  # 0.1 to 0.2 s, 0.2 to 0.4, 0.4 to 0.8, 0.8 to 1.6, 1.6 to 3.2
    assert store.read("one") == b"1"
    assert len(told) == 2 and "answers again" in told[1] and not outage.now
    assert 1.0 <= ended[0] <= time.monotonic() - began + 0.1


@pytest.mark.parametrize("error", [PermissionError("no"), OSError(22, "no such name")])
def test_a_refusal_is_not_tried_again(faults: Callable[..., Faulty], error: OSError) -> None:
    system = faults(error)
    with pytest.raises(UserError, match=r"memory://bucket/one: refused \(.*no.*\)"):
        ObjectStore("memory://bucket", SOON).read("one")
    assert system.asked == 1


def test_large_objects_come_in_parts_and_short_reads_again(
    faults: Callable[..., Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    system = faults()
    store = ObjectStore("memory://bucket", SOON)
    store.write("one", bytes(range(25)))
    system.faults = [None, lambda data: data[:4], None, OSError("reset")]
    got: list[bytes] = []
    store.fetch("one", 25, got.append)
    assert b"".join(got) == bytes(range(25)) and [len(part) for part in got] == [10, 10, 5]


def test_an_object_of_another_size_is_damaged(faults: Callable[..., Faulty]) -> None:
    faults()
    store = ObjectStore("memory://bucket", SOON)
    store.write("one", b"12345")
    with pytest.raises(Damaged, match="memory://bucket/one: 5 bytes, 9 expected"):
        store.fetch("one", 9, lambda data: None)


def test_waiting_ends_when_it_is_interrupted(faults: Callable[..., Faulty]) -> None:
    faults(*[OSError("gone")] * 1000)
    store = ObjectStore("memory://bucket", Patience(60.0, 1.0), outage=Outage(lambda text: None))
    failed: list[UserError] = []

    def read() -> None:
        try:
            store.read("one")
        except Interrupted as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    store.interrupt()
    thread.join(10)
    assert failed and not thread.is_alive()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_with_and_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(module, "CHUNK", 1000)
    content = bytes(index % 251 for index in range(4500))
    (tmp_path / "one").write_bytes(content)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            if not ranges or wanted is None:
                super().do_GET()
                return
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[first : last + 1])

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = ObjectStore(f"http://127.0.0.1:{server.server_port}", SOON)
        got: list[bytes] = []
        store.fetch("one", len(content), got.append)
        assert b"".join(got) == content and store.read("one") == content
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "two").write_bytes(b"22")
        assert store.sizes("sub", ["two", "three"]) == {"two": 2}
        with pytest.raises(Missing):
            store.read("three")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://KEY:SECRET@bucket/x", "credentials"),
        ("https://host/x?token=SECRET", "credentials"),
        ("ftp://host/x", "no such kind"),
        ("memory://", "names no bucket"),
    ],
)
def test_places_that_cannot_be_are_refused_without_showing_secrets(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.root=.*{why}") as caught:
        check_url("data.root", url)
    assert "SECRET" not in str(caught.value) and "KEY" not in str(caught.value)


def test_a_pool_is_not_written_to_a_web_server() -> None:
    with pytest.raises(ConfigError, match=r"replay.store=https://host/x: cannot be written"):
        check_url("replay.store", "https://host/x", write=True)
