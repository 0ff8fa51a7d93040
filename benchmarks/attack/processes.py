"""Faults of processes: killed, signalled, hung, started twice."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

import psutil

from attack.scene import Fault, Scene

HANG_PATIENCE = 60.0  # seconds beyond replay.hang_timeout for a busy supervisor to kill a sampler that hangs
STOPPING_SECONDS = 2.0


def job_ended(scene: Scene) -> Callable[[], str | None]:
    """Answers once every process of the present start is gone."""
    start, began = scene.job.starts, time.monotonic()

    def followed() -> str | None:
        if scene.job.starts == start and (scene.job.code is None or scene.job.members()):
            return None
        return f"ended after {time.monotonic() - began:.1f} s, code {scene.job.code}{scene.job.last_word()}"

    return followed


def signal_role(scene: Scene, role: str, number: signal.Signals) -> Fault | None:
    """Send a signal to one process of a role that a job cannot go on without."""
    found = scene.job.find(role)
    if not found:
        return None
    chosen = scene.random.randrange(len(found))
    victim = f"{role} {chosen}, process {found[chosen].pid}" if role == "rank" else f"{role}, process {found[0].pid}"
    with contextlib.suppress(psutil.Error):
        found[chosen].send_signal(number)
    return Fault(victim, job_ended(scene), ends=True)


def kill_rank(scene: Scene) -> Fault | None:
    return signal_role(scene, "rank", signal.SIGKILL)


def kill_launcher(scene: Scene) -> Fault | None:
    return signal_role(scene, "launcher", signal.SIGKILL)


def kill_runner(scene: Scene) -> Fault | None:
    return signal_role(scene, "runner", signal.SIGKILL)


def kill_all(scene: Scene) -> Fault | None:
    members = scene.job.members()
    for member in members:
        with contextlib.suppress(psutil.Error):
            member.send_signal(signal.SIGKILL)
    return Fault(f"{len(members)} processes", job_ended(scene), ends=True) if members else None


def sigterm(scene: Scene) -> Fault | None:
    return signal_role(scene, scene.random.choice(("rank", "launcher", "runner")), signal.SIGTERM)


def sigusr1(scene: Scene) -> Fault | None:
    return signal_role(scene, scene.random.choice(("rank", "launcher", "runner")), signal.SIGUSR1)


def kill_stopping(scene: Scene) -> Fault | None:
    """A polite signal, and kill -9 of everything while the job saves."""
    fault = signal_role(scene, "rank", signal.SIGTERM)
    if fault is None:
        return None
    kill_at, ended = time.monotonic() + scene.random.uniform(0.0, STOPPING_SECONDS), fault.followed

    def followed() -> str | None:
        if time.monotonic() > kill_at:
            kill_all(scene)
        return ended()

    return Fault(fault.victim, followed, ends=True)


def kill_sampler(scene: Scene) -> Fault | None:
    samplers = scene.job.find("sampler")
    if not samplers:
        return None
    samplers[0].send_signal(signal.SIGKILL)
    return Fault(f"sampler {samplers[0].pid}", replaced(scene, samplers[0]))


def hang_sampler(scene: Scene) -> Fault | None:
    samplers = scene.job.find("sampler")
    if not samplers or not scene.run.sampler(0).exists():
        return None
    victim, began = samplers[0], time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    settled = replaced(scene, victim)

    def followed() -> str | None:
        if victim.is_running() and time.monotonic() - began > scene.hang_timeout + HANG_PATIENCE:
            victim.kill()
            scene.lost.append(f"sampler {victim.pid} hung and nobody noticed")
        return settled()

    return Fault(f"sampler {victim.pid}", followed)


def replaced(scene: Scene, victim: psutil.Process) -> Callable[[], str | None]:
    """Answers once the victim is gone and another sampler runs."""
    start, began = scene.job.starts, time.monotonic()

    def followed() -> str | None:
        if scene.job.starts != start or scene.job.code is not None:
            return "the job ended with it"
        others = [process for process in scene.job.find("sampler") if process.pid != victim.pid]
        gone = not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
        return f"sampler {others[0].pid} after {time.monotonic() - began:.1f} s" if gone and others else None

    return followed


def second_start(scene: Scene) -> Fault | None:
    """The same command while the run is live."""
    try:
        holder = int((scene.run.lock.read_text() or "0").split()[0])
    except (OSError, ValueError):
        return None
    if holder not in {process.pid for process in scene.job.find("rank")}:
        return None
    guest = scene.job.again(f"second-{len(scene.guests) + 1}")
    guest.start()
    scene.guests.append(guest)
    start = scene.job.starts

    def followed() -> str | None:
        over = scene.job.starts != start or scene.job.code is not None
        if guest.code is None and not over:
            return None
        if over:
            guest.kill()
            return "the run ended meanwhile"
        errors = [line for line in guest.output().splitlines() if line.startswith("error")]
        told = len(errors) == 1 and str(scene.run.root) in errors[0] and "Traceback" not in guest.output()
        if guest.code == 2 and told and not guest.members():
            return f"refused after {time.monotonic() - guest.began:.1f} s: {errors[0]}"
        scene.lost.append(f"a second start was not refused properly: code {guest.code}, see {guest.log()}")
        guest.kill()
        return f"NOT refused properly: code {guest.code}, {guest.last_word()}"

    return Fault("the same command again", followed, spares=True)
