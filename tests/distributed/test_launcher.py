"""The real `deepspeed` command: roles of its ranks, and no orphans when it is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.test_lifeline import alive, wait_until_gone

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import os, time
from trainer.lifeline import tie_to_launcher
from trainer.world import join_world, split_ranks
tie_to_launcher()
role = split_ranks(os.environ, 1)
size = join_world(1, 1).size if role.kind == "trainer" else 0
os.write(1, f"rank {role.kind} {role.index} {role.count} {size} {os.getpid()}\\n".encode())  # whole, unlike print
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's PR_SET_PDEATHSIG")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_command_ends_every_rank(tmp_path: Path, signum: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "3", "--master_port", port, "program.py"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    late = threading.Timer(120, runner.kill)  # then no more lines come
    late.start()
    ranks = [line.split()[1:] for line in _lines(runner, 3)]
    late.cancel()
    pids = [int(rank[-1]) for rank in ranks]
    try:
        assert sorted(rank[:-1] for rank in ranks) == [
            ["teacher", "0", "1", "0"],
            ["trainer", "0", "2", "2"],
            ["trainer", "1", "2", "2"],
        ]
        runner.send_signal(signum)
        assert wait_until_gone(pids, 30) == []
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        runner.kill()
        runner.wait()


def _lines(runner: subprocess.Popen[str], count: int) -> list[str]:
    """The first `count` lines of the ranks, among the launcher's."""
    assert runner.stdout is not None
    found = list[str]()
    for line in runner.stdout:
        found += [line] if line.startswith("rank ") else []
        if len(found) == count:
            break
    return found
