"""Roles of ranks, and what needs no other rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer import world
from trainer.errors import UserError
from trainer.world import PortTaken, claim_place, close_places, interface_towards, split_ranks

ROOT = Path(__file__).resolve().parent.parent


def launched(nodes: int, local_size: int) -> list[dict[str, str]]:
    """The environments that the launcher gives to all ranks of equal nodes, in rank order."""
    return [
        {
            "RANK": str(node * local_size + local),
            "LOCAL_RANK": str(local),
            "LOCAL_SIZE": str(local_size),
            "WORLD_SIZE": str(nodes * local_size),
        }
        for node in range(nodes)
        for local in range(local_size)
    ]


def test_without_teacher_ranks_nothing_changes() -> None:
    for index, environ in enumerate(launched(2, 3)):
        role = split_ranks(environ, 0)
        assert (role.kind, role.index, role.count, role.environ) == ("trainer", index, 6, {})


def test_the_last_local_rank_teaches() -> None:
    roles = [split_ranks(environ, 1) for environ in launched(1, 3)]
    assert [(role.kind, role.index, role.count) for role in roles] == [
        ("trainer", 0, 2),
        ("trainer", 1, 2),
        ("teacher", 0, 1),
    ]
    assert roles[1].environ == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert roles[2].environ == {}


def test_several_nodes_number_both_kinds_without_gaps() -> None:
    roles = [split_ranks(environ, 2) for environ in launched(3, 5)]
    trainers = [role for role in roles if role.kind == "trainer"]
    teachers = [role for role in roles if role.kind == "teacher"]
    assert [role.index for role in trainers] == list(range(9))
    assert [role.index for role in teachers] == list(range(6))
    assert [role.environ["RANK"] for role in trainers] == [str(rank) for rank in range(9)]
    assert {role.environ["WORLD_SIZE"] for role in trainers} == {"9"}
    assert {role.environ["LOCAL_SIZE"] for role in trainers} == {"3"}
    assert [role.kind for role in roles[:5]] == ["trainer"] * 3 + ["teacher"] * 2


def test_torchrun_says_its_local_size_otherwise() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    assert split_ranks(environ, 1).kind == "teacher"


@pytest.mark.parametrize("environ", [{}, *launched(1, 2)])
def test_no_rank_left_to_train(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"replay\.devices_per_node=2: no rank is left to train"):
        split_ranks(environ, 2)


def test_unequal_nodes_are_refused() -> None:
    third = {"RANK": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "3", "WORLD_SIZE": "5"}
    with pytest.raises(UserError, match=r"replay\.placement=ranks: needs nodes with equal numbers"):
        split_ranks(third, 1)


def test_loopback_is_the_way_to_oneself() -> None:
    assert interface_towards("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_towards("host.invalid") is None


def test_a_process_without_launcher_is_a_world_of_one() -> None:
    """No compiler, no DeepSpeed chatter, and the exit code asked for."""
    program = (
        "from trainer.world import join_world, leave_world\n"
        "world = join_world(0, 1)\n"
        "import deepspeed.comm as comm\n"
        "print(world.rank, world.size, world.is_main, comm.get_world_size())\n"
        "leave_world(world, int(__import__('sys').argv[1]))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PYTHONPATH": str(ROOT), "PATH": "/nonexistent"}  # no compiler and no ninja can be found
    command = [sys.executable, "-c", program]
    runs = [
        subprocess.run([*command, code], env=environ, capture_output=True, text=True, timeout=120)
        for code in ("0", "2")
    ]
    assert [run.returncode for run in runs] == [0, 2]
    assert runs[0].stdout.splitlines() == ["0 1 True 1"]
    assert runs[0].stderr == ""


def listening(port: int = 0) -> dist.TCPStore:
    """As a job's main rank does; at any port that is free."""
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Those of rank 1."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return monkeypatch


def test_each_rank_has_one_place_in_a_job(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(world, "CLAIM_SECONDS", 0.1)
    job = listening()
    environ.setenv("MASTER_PORT", str(job.port))
    claim_place(20)
    with pytest.raises(PortTaken, match=rf"^127\.0\.0\.1:{job.port}: another program has this port"):
        claim_place(20)
    environ.setenv("RANK", "2")
    claim_place(20)


def test_a_complete_job_has_no_place_left(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(world, "CLAIM_SECONDS", 0.1)
    job = listening()
    environ.setenv("MASTER_PORT", str(job.port))
    close_places(20)  # by rank 1: it is not for it to say
    claim_place(20)
    environ.setenv("RANK", "0")
    close_places(20)
    environ.setenv("RANK", "2")
    with pytest.raises(PortTaken):
        claim_place(20)


@pytest.mark.parametrize(("name", "value"), [("RANK", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "True")])
def test_who_asks_nobody_for_a_place(environ: pytest.MonkeyPatch, name: str, value: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        environ.setenv("MASTER_PORT", str(nobody.getsockname()[1]))
        with pytest.raises(dist.DistNetworkError):
            claim_place(0.1)
        environ.setenv(name, value)
        claim_place(0.1)


def test_a_job_that_ends_makes_room(environ: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def store(timeout: float) -> dist.TCPStore:
        found = dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        asked.set()
        return found

    environ.setattr(world, "_store", store)
    job = listening()
    port = job.port
    claim_place(20)
    asked.clear()
    waiting = threading.Thread(target=claim_place, args=(20,))
    waiting.start()
    assert asked.wait(20)
    waiting.join(0.3)
    assert waiting.is_alive(), "the place is taken"
    del job
    following = listening(port)
    waiting.join(20)
    assert not waiting.is_alive() and following.check([f"{world.PLACES}/rank-1"])


def test_a_port_that_is_taken_is_told() -> None:
    program = (
        "from trainer.world import PortTaken, join_world\n"
        "try:\n"
        "    join_world(0, 1)\n"
        "except PortTaken as error:\n"
        "    print(error)\n"
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environ = os.environ | place | {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith(f"127.0.0.1:{port}: another program has this port"), run.stderr
