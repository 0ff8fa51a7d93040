"""Ranks end with the launcher that started them.

`deepspeed` (the runner, the process a person sees) starts `deepspeed.launcher.launch`, which starts the ranks. Killing
either leaves the ranks running as orphans that hold their devices. Here a rank gets SIGTERM when its launcher dies (the
kernel's PR_SET_PDEATHSIG), so that it saves and ends, and is killed where it does not; when the runner is gone the
node's first rank asks the launcher to stop, which ends every rank in the ordinary way: SIGTERM, time to save, SIGKILL.
A launcher that a runner started over ssh (pdsh) is asked to stop when that connection has ended: sshd leaves commands
without a terminal alone.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 1.0
GRACE_SECONDS = 60.0  # for a rank without a launcher to save and end
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "tmux", "screen", "init", "systemd"})
REAPERS = frozenset({"init", "systemd"})
RUNNERS = frozenset({"deepspeed", "ds", "deepspeed.launcher.runner"})

_tied = False


def tie_to_launcher() -> None:
    """Make this rank stop when its launcher dies; does nothing without a launcher or outside Linux. Repeatable."""
    global _tied
    launcher = os.getppid()
    if _tied or not sys.platform.startswith("linux") or "RANK" not in os.environ:
        return
    if "CROSS_RANK" in os.environ and not any("deepspeed.launcher.launch" in word for word in _arguments(launcher)):
        os.kill(os.getpid(), signal.SIGTERM)  # only DeepSpeed's launcher sets it: it has died while this rank imported
    if _name(launcher) in SHELLS:
        return
    _tied = True
    die_with_parent(launcher, signal.SIGTERM)
    end_after_parent(launcher, GRACE_SECONDS)
    runner = _parent(launcher)
    if os.environ.get("LOCAL_RANK") != "0" or runner is None:
        return
    if _is_runner(runner):
        watch_runner(launcher, runner)
    elif (connection := _connection(launcher)) is not None:
        child, server = connection
        watch_runner(child, server, lambda _: _terminate(launcher))
    elif _is_adopted(runner) and _is_local(launcher):
        _terminate(launcher)  # its runner, which was on this machine, has died while this rank imported


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send `signum` to this process when its parent, of process id `parent`, dies (Linux only)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel knew that we care
        os.kill(os.getpid(), signum)


def end_after_parent(parent: int, grace: float) -> threading.Thread:
    """End this process, whatever it waits for, `grace` seconds after its parent has died, from a daemon thread."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=watch, name="end-after-parent", daemon=True)
    thread.start()
    return thread


def watch_runner(launcher: int, runner: int, stop: Callable[[int], None] | None = None) -> threading.Thread:
    """Stop `launcher` (by SIGTERM) once it is no longer a child of `runner`: a daemon thread looks every second."""

    def watch() -> None:
        while _parent(launcher) == runner:
            time.sleep(LOOK_SECONDS)
        (stop or _terminate)(launcher)

    thread = threading.Thread(target=watch, name="watch-runner", daemon=True)
    thread.start()
    return thread


def _terminate(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return


def _name(pid: int) -> str:
    """A process' name, without the dash of login shells; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip().lstrip("-").split(":")[0]
    except OSError:
        return ""


def _parent(pid: int) -> int | None:
    """The parent's process id, or None when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])  # the name before it may hold blanks and brackets


def _is_runner(pid: int) -> bool:
    return any(Path(argument).name in RUNNERS for argument in _arguments(pid)[:4])


def _connection(launcher: int) -> tuple[int, int] | None:
    """The sshd by whose connection a launcher was started, and its child: the launcher, or a shell above it."""
    child = launcher
    while (parent := _parent(child)) is not None:
        if _name(parent).startswith("sshd"):  # in newer versions sshd-session
            return child, parent
        if _name(parent) not in SHELLS - REAPERS:
            return None
        child = parent
    return None


def _is_adopted(parent: int) -> bool:
    """Whether this is who takes over children whose parents have died."""
    return (parent == 1 or _name(parent) in REAPERS) and _name(parent) not in SHELLS - REAPERS


def _is_local(launcher: int) -> bool:
    """Whether a runner started this launcher of DeepSpeed's on its own machine, without a hostfile."""
    prefix = "--world_info="
    words = [word.removeprefix(prefix) for word in _arguments(launcher) if word.startswith(prefix)]
    try:
        return list(json.loads(base64.urlsafe_b64decode(words[0]))) == ["localhost"]
    except (IndexError, ValueError, TypeError):
        return False


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
