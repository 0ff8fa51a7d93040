"""Ranks end with their launcher, and launchers with their runner: real processes, without DeepSpeed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RANK = """
import time
from trainer.lifeline import tie_to_launcher
tie_to_launcher()
print("tied", flush=True)
time.sleep(600)
"""
# As deepspeed's: the runner starts the launcher and waits, the launcher starts the ranks and ends them on SIGTERM.
LAUNCHER = f"""
import os, signal, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {{"RANK": str(r), "LOCAL_RANK": str(r)}}) for r in range(2)]
for rank in ranks:
    assert rank.stdout.readline() == "tied\\n"
print(os.getpid(), *(rank.pid for rank in ranks), flush=True)
def end(*_):
    for rank in ranks:
        rank.terminate()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
time.sleep(600)
"""
RUNNER = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LAUNCHER!r}]).wait()"


def alive(pid: int) -> bool:
    """Running, and no zombie that merely waits to be asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's PR_SET_PDEATHSIG")
@pytest.mark.parametrize("name", ["deepspeed", "sshd-session"])
@pytest.mark.parametrize("victim", ["launcher", "runner"])
def test_no_rank_outlives_the_launcher_or_what_started_it(tmp_path: Path, victim: str, name: str) -> None:
    script = tmp_path / name  # the runner, or the connection that the launcher was started by, is known by its name
    script.write_text(f"#!{sys.executable}\n{RUNNER}")
    script.chmod(0o755)
    runner = subprocess.Popen(
        [sys.executable, str(script)] if name == "deepspeed" else [str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert runner.stdout is not None
    launcher, *ranks = (int(pid) for pid in runner.stdout.readline().split())
    try:
        assert len(ranks) == 2
        assert all(map(alive, [launcher, *ranks]))
        os.kill(runner.pid if victim == "runner" else launcher, signal.SIGKILL)
        assert wait_until_gone([launcher, *ranks], 20) == []
    finally:
        for pid in filter(alive, [launcher, *ranks]):
            os.kill(pid, signal.SIGKILL)
        runner.kill()
        runner.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's PR_SET_PDEATHSIG")
def test_rank_whose_launcher_died_while_it_was_importing_ends() -> None:
    """DeepSpeed's launcher sets CROSS_RANK; the parent here is none."""
    program = "from trainer.lifeline import tie_to_launcher; tie_to_launcher(); print('goes on')"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    orphan = subprocess.run([sys.executable, "-c", program], env=os.environ | ranks | {"CROSS_RANK": "0"}, timeout=60)
    assert orphan.returncode == -signal.SIGTERM
    other = subprocess.run([sys.executable, "-c", program], env=os.environ | ranks, timeout=60)
    assert other.returncode == 0
