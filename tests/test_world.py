"""Roles of ranks, and what needs no other rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.world import interface_towards, split_ranks

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
