"""Samplers that hang, stand by or are started by hand: real processes under their supervisors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.replay import lock, supervisor
from trainer.replay.child import SIGNS_VARIABLE, signs_of_life
from trainer.replay.events import count_events, read_events
from trainer.replay.lock import refuse, stand_by, worker_lock
from trainer.replay.manifest import Manifest
from trainer.replay.state import process_alive, read_json, write_state
from trainer.replay.supervisor import PACKAGE_ROOT, Ear, Supervisor, child_environment
from trainer.replay.told import Told

SECONDS = 90.0  # a machine under load starts Python slowly
# Gives signs of life, but no heartbeat, until it is killed.
LIVELY = """
import time
from trainer.replay.child import signs_of_life
alive = signs_of_life()
for number in range(100000):
    alive()
    if number in (0, 60):
        print("sign", number, flush=True)
    time.sleep(0.05)
"""
# Spends 5 seconds on importing modules that take a quarter of a second each.
STARTING = """
import importlib, sys, time
from trainer.replay.child import imports_are_progress, signs_of_life
sys.path.insert(0, {directory!r})
before = list(sys.meta_path)
with imports_are_progress(signs_of_life()):
    for number in range(20):
        importlib.import_module(f"slow_{{number}}")
print("imported", before == sys.meta_path, flush=True)
while True:
    importlib.invalidate_caches()
    try:
        import nothing_of_this_name
    except ImportError:
        time.sleep(0.05)
"""


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
    return value


def shards(workplace: Any) -> int:
    manifest = Manifest(workplace.run.replay(2))
    manifest.refresh()
    return len(manifest.shards)


@pytest.fixture
def supervise(workplace: Any) -> Any:
    started: list[Supervisor] = []

    def start(**options: Any) -> Supervisor:
        started.append(Supervisor(workplace.run, worker=0, workers=1, device="cpu", backoff=0.01, **options))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


def as_child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(Supervisor, "_command", lambda self: [sys.executable, "-S", "-c", script])


def test_a_stopped_child_is_killed_and_started_again(
    workplace: Any, supervise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_child(monkeypatch, LIVELY)
    one = supervise(hang_timeout=2.5)
    until(lambda: one.log.exists() and "sign 60" in one.log.read_text())  # 3 seconds and more: it is left in peace
    first = one.child.pid
    assert not one.restarted
    os.kill(first, signal.SIGSTOP)
    until(lambda: one.restarted and one.child.pid != first)
    assert not process_alive(first)
    until(lambda: one.log.read_text().count("sign 60") == 2)
    events = read_events(workplace.run)
    assert [event["event"] for event in events] == ["sampler_hung", "sampler_restart"]
    assert events[0]["pid"] == first and events[0]["worker"] == 0 and events[1]["code"] == -signal.SIGKILL
    assert process_alive(one.child.pid) and not one.given_up


def test_a_child_that_still_imports_does_not_hang(
    workplace: Any, supervise: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(20):
        (tmp_path / f"slow_{number}.py").write_text("import time; time.sleep(0.25)")
    as_child(monkeypatch, STARTING.format(directory=str(tmp_path)))
    one = supervise(hang_timeout=2.5)
    until(lambda: one.log.exists() and "imported" in one.log.read_text())
    assert one.log.read_text() == "imported True\n" and not one.restarted
    first = one.child.pid
    until(lambda: one.restarted)  # what is imported later is no sign of life
    assert not process_alive(first)


def test_a_child_that_never_gives_a_sign_is_given_up(
    workplace: Any, supervise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_child(monkeypatch, "import time; print('mute', flush=True); time.sleep(600)")
    one = supervise(hang_timeout=1.0, restarts=1)
    until(lambda: one.given_up and read_json(workplace.run.supervisor(0))["given_up"])
    assert "died 2 times in a row (last exit code -9)" in one.given_up
    counts = count_events(workplace.run)
    assert (counts["sampler_hung"], counts["sampler_restart"], counts["sampler_given_up"]) == (2, 1, 1)
    assert read_json(workplace.run.supervisor(0))["given_up"] == one.given_up


def test_a_supervisor_that_was_stopped_itself_heard_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    ear = Ear()
    try:
        silences = []
        for seconds in (0.25, 0.25, 1000.0):
            now[0] += seconds
            silences.append(ear.silence())
        assert silences == [0.25, 0.5, 0.5 + supervisor.LONGEST_LOOK]
        monkeypatch.setenv(SIGNS_VARIABLE, str(os.dup(ear.writer)))
        sign = signs_of_life()
        for _ in range(70000):  # more than a pipe holds: it must not block
            sign()
        assert ear.silence() == 0.0 and SIGNS_VARIABLE not in os.environ
    finally:
        ear.close()


def test_a_signal_ends_a_wait_at_once() -> None:
    told, before = Told(), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, told.set)
    try:
        assert not told.wait(0.01) and not told.is_set()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began = time.monotonic()
        assert told.wait(60.0) and told.is_set() and time.monotonic() - began < 30.0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_sign_that_nobody_hears_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNS_VARIABLE, raising=False)
    signs_of_life()()
    reader, writer = os.pipe()
    monkeypatch.setenv(SIGNS_VARIABLE, str(writer))
    sign = signs_of_life()
    os.close(reader)
    sign()
    os.close(writer)


def test_a_log_that_finds_no_room_is_done_without(
    workplace: Any, supervise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse_log(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".log":
            raise OSError(28, "No space left on device")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse_log)
    as_child(monkeypatch, LIVELY)
    one = supervise()
    until(lambda: one.child)
    assert process_alive(one.child.pid) and not one.log.exists()


def test_standing_by_is_a_sign_of_life_and_ends_when_told(capfd: pytest.CaptureFixture[str]) -> None:
    stop, signs = Told(), list[None]()
    wait = stand_by(3, stop, lambda: signs.append(None))
    assert wait("taken") and wait("taken") and len(signs) == 2
    stop.set()
    assert not wait("taken") and capfd.readouterr().err == "sampler 3: taken; standing by\n"


def test_a_supervised_second_sampler_takes_over_when_the_first_ends(workplace: Any, supervise: Any) -> None:
    path = workplace.run.sampler_lock(0)
    with worker_lock(path, refuse(path, 0, Told())) as held:
        assert held
        one = supervise()
        until(lambda: one.log.exists() and "standing by" in one.log.read_text())
        assert not workplace.run.sampler(0).exists()  # the heartbeat is the first one's
    until(lambda: shards(workplace) == 9)
    assert not one.restarted and not any(count_events(workplace.run).values())


def by_hand(workplace: Any, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PACKAGE_ROOT / "launch" / "teacher.py"), "--run", str(workplace.run.root), *options]
    environment = child_environment(os.environ, 1)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def child_of(workplace: Any, but: int = 0) -> int:
    """The process id of the sampler, once there is one other than `but`."""
    return until(lambda: (pid := read_json(workplace.run.supervisor(0)).get("child", 0)) != but and pid)


def test_by_hand_a_killed_sampler_is_started_again_and_ends_with_the_run(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(steps=30)
    teacher = by_hand(workplace)
    until(lambda: shards(workplace))
    first = child_of(workplace)
    os.kill(first, signal.SIGKILL)
    second = child_of(workplace, but=first)
    until(lambda: shards(workplace) == 9)
    write_state(workplace.run, 2, finished=True)
    output, errors = teacher.communicate(timeout=SECONDS)
    assert (teacher.returncode, output, errors) == (0, "", "") and not process_alive(second)
    assert count_events(workplace.run)["sampler_restart"] == 1


def test_by_hand_it_gives_up_with_one_line(workplace: Any) -> None:
    teacher = by_hand(workplace, "--restarts", "0")
    os.kill(child_of(workplace), signal.SIGKILL)
    _, errors = teacher.communicate(timeout=SECONDS)
    assert teacher.returncode == 1 and len(errors.splitlines()) == 1
    assert errors.startswith("error: sampler 0 died once (exit code -9), see ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_by_hand_a_signal_ends_both(workplace: Any, number: signal.Signals) -> None:
    teacher = by_hand(workplace)
    child = child_of(workplace)
    teacher.send_signal(number)
    _, errors = teacher.communicate(timeout=SECONDS)
    assert (teacher.returncode, errors) == (0, "") and not process_alive(child)


def test_by_hand_a_taken_number_is_refused_at_once(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workplace.run.sampler_lock(0)
    with worker_lock(path, refuse(path, 0, Told())) as held:
        assert held
        teacher = by_hand(workplace)
        _, errors = teacher.communicate(timeout=SECONDS)
    assert teacher.returncode == 2 and len(errors.splitlines()) == 1
    assert errors.startswith(f"error: {path}: another sampler") and not workplace.run.supervisor(0).exists()


def test_by_hand_an_error_that_a_person_must_mend_ends_it_at_once(workplace: Any) -> None:
    teacher = by_hand(workplace, "--device", "cuda:77")
    _, errors = teacher.communicate(timeout=SECONDS)
    assert teacher.returncode == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("error: --device cuda:77: not on this machine")
    assert not count_events(workplace.run)["sampler_restart"]


def test_a_full_disk_is_waited_for_with_its_own_word(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reasons = workplace.run.sampler_lock(0), list[str]()

    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    def wait(reason: str) -> bool:
        reasons.append(reason)
        monkeypatch.undo()
        return True

    monkeypatch.setattr(lock.Path, "open", no_room)
    with worker_lock(path, wait) as held:
        assert held and reasons == ["No space left on device"]
