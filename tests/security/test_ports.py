"""The sampler talks through files alone: it listens on no port."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.fuzz.conftest import Workplace, workplace
from trainer.replay.state import write_state

__all__ = ["workplace"]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0  # a machine under load starts Python slowly


def sockets(process: psutil.Process) -> list[str]:
    """Network sockets of a process and all its children: TCP that listens or is connected, and UDP of any kind."""
    found: list[str] = []
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += [str(connection) for connection in member.net_connections(kind="inet")]
    return found


@pytest.mark.timeout(240)
def test_a_sampler_opens_no_port(workplace: Workplace) -> None:
    write_state(workplace.run, 2)
    command = [sys.executable, str(ROOT / "launch" / "teacher.py"), "--run", str(workplace.run.root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    sampler = subprocess.Popen(command, env=environment, start_new_session=True)
    shards, looked, deadline = 0, 0, time.monotonic() + SECONDS
    try:
        process = psutil.Process(sampler.pid)
        while shards < 3:
            assert sampler.poll() is None and time.monotonic() < deadline, "it did not sample"
            assert sockets(process) == []
            shards = len(list(workplace.run.replay(2).glob("replay-*.tar")))
            looked += 1
            time.sleep(0.02)
        assert looked > 3
    finally:
        sampler.terminate()
        sampler.wait(30)


def test_the_test_sees_a_port() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert len(sockets(psutil.Process(child.pid))) == 1
    child.kill()
    child.communicate()
