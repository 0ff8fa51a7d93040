"""Samplers as real processes: killed, restarted, given up, never orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Crew

import trainer.replay.supervisor
from trainer.errors import UserError
from trainer.replay import sidecar
from trainer.replay.command import main
from trainer.replay.manifest import Manifest
from trainer.replay.sidecar import Sampler
from trainer.replay.state import process_alive, process_started, read_json, write_state
from trainer.replay.supervisor import PACKAGE_ROOT, Supervisor, child_environment

SECONDS = 60.0  # a machine under load starts Python slowly


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def published(workplace: Any) -> Manifest:
    manifest = Manifest(workplace.run.replay(2))
    manifest.refresh()
    return manifest


def python(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = child_environment(os.environ, 1)
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def launch_rank(workplace: Any) -> subprocess.Popen[bytes]:
    """A launcher whose only rank is a teacher's; it ends with that rank's exit code."""
    rank = f"""
import pathlib
from trainer.replay.supervisor import supervise_until_finished
from trainer.run import RunDir
supervise_until_finished(RunDir(pathlib.Path({str(workplace.run.root)!r})), worker=0, workers=1, device="cpu")
"""
    return python("import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))", rank)


def test_killed_it_is_restarted_and_makes_the_same_pool(make_workplace: Callable[..., Any]) -> None:
    reference, workplace = make_workplace("reference", steps=30), make_workplace("killed", steps=30)
    reference.fill()
    supervisor = Supervisor(workplace.run, worker=0, workers=1, device="cpu", restarts=1, backoff=0.01)
    supervisor.start()
    try:
        until(lambda: published(workplace).shards)
        first = supervisor.child.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: len(published(workplace).shards) == 9)
    finally:
        supervisor.stop()
    assert workplace.files() == reference.files()
    assert published(workplace).evaluations == 9 * 6 * 33  # nothing published was made twice
    assert supervisor.restarted == 1 and supervisor.child.pid != first and not supervisor.given_up
    assert read_json(workplace.run.supervisor(0))["restarts"] == 1
    assert not process_alive(supervisor.child.pid)


def test_a_sampler_that_cannot_work_is_given_up_and_the_trainer_told(workplace: Any) -> None:
    (workplace.run.teacher(1) / "model.safetensors").write_bytes(b"damaged")
    supervisor = Supervisor(workplace.run, worker=0, workers=1, device="cpu", restarts=0, attempt=3)
    crew = Crew(workplace, timeout=SECONDS)
    supervisor.start()
    try:
        with pytest.raises(UserError) as caught:
            crew.may_begin(0, SECONDS)
        assert crew.events() == {"sampler_given_up": 1}
    finally:
        crew.close()
        supervisor.stop()
    log = workplace.run.teacher_log(3, 0)
    assert f"died once (exit code 2), see {log}: error: {workplace.run.teacher(1)}" in str(caught.value)
    assert len(log.read_text().splitlines()) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("publishes", "starts"), [(False, 3), (True, 5)])
def test_only_deaths_in_a_row_without_a_shard_count(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, publishes: bool, starts: int
) -> None:
    """A child that dies at once; where it `publishes`, each of the first two has made a shard before."""
    count, beat = workplace.run.root / "count", workplace.run.sampler(0)
    script = f"""
import json, os, pathlib
count, beat = pathlib.Path({str(count)!r}), pathlib.Path({str(beat)!r})
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
beat.write_text(json.dumps({{"pid": os.getpid(), "shards": int({publishes} and number <= 2)}}))
print("child", number)
os._exit(7)
"""
    monkeypatch.setattr(Supervisor, "_command", lambda self: [sys.executable, "-S", "-c", script])
    beat.parent.mkdir(exist_ok=True)
    supervisor = Supervisor(workplace.run, worker=0, workers=1, device="cpu", restarts=2, backoff=0.01)
    supervisor.start()
    until(lambda: supervisor.given_up)
    supervisor.stop()
    assert int(count.read_text()) == starts and supervisor.restarted == starts - 1
    assert (
        supervisor.given_up.endswith(f"child {starts}") and "3 times in a row (last exit code 7)" in supervisor.given_up
    )


def test_a_child_that_will_not_end_is_killed(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.replay.supervisor, "STOP_SECONDS", 0.3)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    monkeypatch.setattr(Supervisor, "_command", lambda self: [sys.executable, "-S", "-c", script])
    supervisor = Supervisor(workplace.run, worker=0, workers=1, device="cpu")
    supervisor.start()
    until(lambda: supervisor.log.exists() and supervisor.log.read_text())
    began = time.monotonic()
    supervisor.stop()
    supervisor.stop()
    assert time.monotonic() - began < 5 and supervisor.child.returncode == -signal.SIGKILL


def test_no_orphan_when_the_parent_is_killed(workplace: Any) -> None:
    parent = python(
        f"""
        import pathlib, time
        from trainer.replay.supervisor import Supervisor
        from trainer.run import RunDir
        supervisor = Supervisor(RunDir(pathlib.Path({str(workplace.run.root)!r})), worker=0, workers=1, device="cpu")
        supervisor.start()
        time.sleep(600)
        """
    )
    until(lambda: read_json(workplace.run.supervisor(0)).get("child"))
    child = read_json(workplace.run.supervisor(0))["child"]
    until(lambda: os.getsid(child) == child)  # a session of its own
    assert process_alive(child)
    parent.kill()
    parent.wait()
    until(lambda: not process_alive(child), 15.0)


def test_by_hand_it_serves_until_sigterm_and_the_next_one_goes_on(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(steps=30)
    command = [sys.executable, str(PACKAGE_ROOT / "launch" / "teacher.py"), "--run", str(workplace.run.root)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    sampler = subprocess.Popen([*command, "--worker", "1", "--workers", "2"], env=environment, start_new_session=True)
    until(lambda: published(workplace).shards)
    sampler.terminate()
    assert sampler.wait(15) == 0 and read_json(workplace.run.sampler(1))["status"] == "ended"
    assert published(workplace).shards.keys() <= {1, 3, 5, 7}
    workplace.fill()
    assert len(published(workplace).shards) == 9 and published(workplace).evaluations == 9 * 6 * 33


def test_by_hand_it_ends_when_the_run_is_finished(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(workplace.run, 1, finished=True)  # before it started: perhaps another task is coming
    sampler = Sampler(workplace.run, 0, 1, torch.device("cpu"), by_hand=True)
    thread = threading.Thread(target=sampler.serve)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    write_state(workplace.run, 2)
    until(lambda: len(published(workplace).shards) == 9)
    write_state(workplace.run, 2, finished=True)
    thread.join(SECONDS)
    assert not thread.is_alive() and read_json(workplace.run.sampler(0))["evaluations"] == 9 * 42
    monkeypatch.setattr(sidecar, "FINISHED_SECONDS", 0.2)
    Sampler(workplace.run, 0, 1, torch.device("cpu"), by_hand=True).serve()  # no task comes: it ends


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--worker", "2", "--workers", "2"), "--worker 2: must be 0 to 1"),
        (("--threads", "0"), "threads"),
        (("--sloth", "1"), "sloth"),
        (("--restarts", "-1"), "restarts"),
        (("--hang-timeout", "0"), "hang-timeout"),
        (("--hang-timeout", "nan"), "hang-timeout"),
    ],
)
def test_wrong_arguments_are_user_errors(workplace: Any, arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(UserError, match=word):
        main(["--run", str(workplace.run.root), *arguments])


def test_a_teacher_rank_supervises_until_the_run_of_its_own_launch_is_finished(workplace: Any) -> None:
    write_state(workplace.run, 2, finished=True)  # of an earlier attempt
    time.sleep(0.05)
    launcher = launch_rank(workplace)
    time.sleep(1.0)
    assert launcher.poll() is None and not workplace.run.supervisor(0).exists()
    workplace.run.log(4).mkdir(parents=True)
    write_state(workplace.run, 2)
    until(lambda: read_json(workplace.run.supervisor(0)).get("child"))
    child = read_json(workplace.run.supervisor(0))["child"]
    assert launcher.poll() is None and process_alive(child) and workplace.run.teacher_log(4, 0).exists()
    write_state(workplace.run, 2, finished=True)
    assert launcher.wait(SECONDS) == 0 and not process_alive(child)


def test_a_teacher_rank_ends_with_its_launcher(workplace: Any) -> None:
    launcher = launch_rank(workplace)
    write_state(workplace.run, 2)
    until(lambda: read_json(workplace.run.supervisor(0)).get("child"))
    status = read_json(workplace.run.supervisor(0))
    launcher.kill()
    launcher.wait()
    until(lambda: not process_alive(status["pid"]) and not process_alive(status["child"]), 15.0)


def test_the_childs_environment_has_no_rank() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_PORT": "1", "WORLD_SIZE": "2", "HOME": "/h"}
    environ |= {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/p", "MASTER_ADDR": "a"}
    child = child_environment(environ, 3)
    assert child.pop("PYTHONPATH") == f"{PACKAGE_ROOT}{os.pathsep}/p"
    assert child == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "3",
        "PYTHONUNBUFFERED": "1",
        "PALIMPSEST_PARENT": str(os.getpid()),
    }


def test_when_a_process_started() -> None:
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert before - 0.05 < process_started(child.pid) < time.time() + 0.05
    assert process_alive(child.pid)
    child.kill()
    until(lambda: not process_alive(child.pid), 5.0)  # a zombie is not alive
    child.wait()
    assert process_started(child.pid) == 0.0 and not process_alive(child.pid)
