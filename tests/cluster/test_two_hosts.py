"""The forms of a launch over two hosts: each ends with the weights of one host with as many ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .hosts import HOSTS, TwoHosts, lacking, two_hosts
from .jobs import START_SECONDS, Place, leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_a_hostfile_trains_the_same_model(place: Place, one_host: list[str]) -> None:
    """The sidecar is a child of the main rank, on the main host."""
    job = place.deepspeed("--hostfile hostfile1")
    assert job.wait(START_SECONDS) == 0, job.printed()
    assert place.teachers() == one_host
    assert [place.left(host) for host in HOSTS] == [[], []]


def test_teacher_ranks_on_both_hosts(place: Place, one_host: list[str]) -> None:
    job = place.deepspeed("--hostfile hostfile2", "replay.placement=ranks")
    assert job.wait(START_SECONDS) == 0, job.printed()
    assert place.teachers() == one_host
    supervisors = [json.loads(place.run.supervisor(worker).read_text()) for worker in (0, 1)]
    assert [status["host"] for status in supervisors] == list(HOSTS)
    samplers = [json.loads(place.run.sampler(worker).read_text()) for worker in (0, 1)]
    assert all(beat["shards"] > 0 for beat in samplers), "both have sampled"
    assert [place.left(host) for host in HOSTS] == [[], []]


def test_without_ssh_and_with_a_teacher_of_its_own(place: Place, one_host: list[str]) -> None:
    """As in Kubernetes: the command is started on each host, and the teacher by itself on one of them."""
    flags = "--hostfile hostfile1 --no_ssh --master_addr 10.77.0.11 --node_rank"
    jobs = [
        place.deepspeed(f"{flags} {number}", "replay.placement=external", host=host, alive="")
        for number, host in enumerate(HOSTS)
    ]
    jobs[0].wait_until(place.run.state.exists)
    teacher = place.teacher("node2")
    for job in jobs:
        assert job.wait(START_SECONDS) == 0, job.printed()
    assert teacher.wait(START_SECONDS) == 0, teacher.printed()
    assert place.teachers() == one_host
    assert json.loads(place.run.sampler(0).read_text())["host"] == "node2"
    assert [place.left(host) for host in HOSTS] == [[], []]


def test_a_refusal_ends_all_hosts(place: Place) -> None:
    """What the main rank alone can see; the others must not wait for it."""
    job = place.deepspeed("--hostfile hostfile1", "data.source=idx", "data.source_path=nowhere")
    assert job.wait(START_SECONDS) == 2, job.printed()
    said = [line for line in job.printed().splitlines() if "error: " in line]
    assert len(said) == 1, job.printed()
    assert said[0].startswith("node1: error: nowhere: missing; put the raw images there (key data.source_path)")
    assert "Traceback" not in job.printed()
    assert [place.left(host) for host in HOSTS] == [[], []]


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    """Of themselves, and of what runs on them: beside the hosts of the other tests."""
    if (reason := lacking()) is not None:
        pytest.skip(reason)
    before = leftovers()
    with two_hosts(tmp_path / "hosts") as hosts:
        assert hosts.run("node1", "hostname").strip() == "node1"
        assert len(leftovers()) > len(before)
        orphan = hosts.start("node2", "setsid sleep 1234", tmp_path / "log")
        running = {pid for host in HOSTS for pid in hosts.running(host)}
    assert leftovers() == before
    end = time.monotonic() + 60.0  # the kernel takes processes apart one by one
    while (left := [pid for pid in running if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
    orphan.wait(10)


def test_hosts_are_apart_while_the_cable_is_pulled(hosts: TwoHosts) -> None:
    ping = "ssh -o ConnectTimeout=2 node2 hostname"
    assert hosts.run("node1", ping).strip() == "node2"
    hosts.cut("node2")
    try:
        assert hosts.run("node1", f"{ping} || echo apart").strip() == "apart"
        assert hosts.running("node2"), "it can be looked at all the same"
    finally:
        hosts.mend("node2")
