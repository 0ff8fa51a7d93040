"""Faults of a job over two hosts: all of it ends in time or goes on, and the same command ends with the same weights.

The tests of the first part share one run, in order: each finds it where the one before has left it, goes on and does
the next thing to it; the last lets it end.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import pytest

from . import faults
from .faults import TABLE, Ended
from .hosts import HOSTS, TwoHosts
from .jobs import SETTINGS, SHORT, START_SECONDS, STEPS, TIMEOUT, Job, Place

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

MORE = 8  # steps that the run must have gone on before the next fault
SAVE_SECONDS = 30.0  # that DeepSpeed's launcher gives a rank to save and end
GRACE_SECONDS = 60.0  # beside that, for launcher, pdsh and ssh to end after the ranks: a few on an idle machine
WATCHED_SECONDS = 150.0


@pytest.fixture(scope="module")
def shared(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(hosts, tmp_path_factory.mktemp("faults") / "place", SETTINGS | SHORT)
    yield place
    place.end()


def goes_on(place: Place) -> Job:
    """The command, once it has gone on from where the run stood."""
    before = place.checkpointed()
    job = place.deepspeed("--hostfile hostfile1")
    job.wait_until(lambda: place.checkpointed() >= before + MORE)
    return job


def learns(place: Place) -> Job:
    """The command, once it learns: no checkpoint is due before the end of a task."""
    lines = logged(place)
    job = place.deepspeed("--hostfile hostfile1", "checkpoint.every_images=1000000")
    job.wait_until(lambda: logged(place) >= lines + 3)
    return job


def logged(place: Place) -> int:
    log = place.run.metrics_log
    return log.read_text().count('"event": "train"') if log.exists() else 0


def suffer(
    place: Place, fault: Callable[[Place], None], name: str, start: Callable[[Place], Job] = goes_on
) -> tuple[Job, Ended]:
    job = start(place)
    ended = faults.suffer(place, job, fault, WATCHED_SECONDS)
    TABLE.append(ended.line(name))
    place.end()
    assert ended.last is not None, f"{TABLE[-1]}\n{job.printed()}"
    assert not place.run.metrics.exists(), "too late: the run had ended"
    return job, ended


def test_a_killed_worker_ends_all_at_once(shared: Place) -> None:
    _, ended = suffer(shared, faults.kill_worker, "a worker killed (-9)")
    assert ended.code and ended.last is not None and ended.last < GRACE_SECONDS


def test_a_host_without_power_is_noticed_in_time(shared: Place) -> None:
    job, ended = suffer(shared, faults.kill_host, "a host without power")
    assert ended.code and ended.last is not None and ended.last < TIMEOUT + GRACE_SECONDS
    assert "error: rank 1 on node2 has given no sign of life for 20 s (key cluster.timeout)" in job.printed()


def test_the_main_host_without_power_leaves_no_orphans_on_the_other(shared: Place) -> None:
    _, ended = suffer(shared, faults.kill_main_host, "the main host without power")
    assert ended.last is not None and ended.last < TIMEOUT + GRACE_SECONDS


def test_a_cut_network_ends_both_sides_in_time(shared: Place) -> None:
    _, ended = suffer(shared, faults.cut, "network cut for good")
    assert ended.code and ended.last is not None and ended.last < TIMEOUT + GRACE_SECONDS


def test_sigterm_to_the_command_saves_and_ends_all(shared: Place) -> None:
    before = shared.checkpointed()
    _, ended = suffer(shared, faults.terminate, "SIGTERM to deepspeed", learns)
    assert ended.code and ended.last is not None and ended.last < SAVE_SECONDS + GRACE_SECONDS
    assert shared.checkpointed() > before, "saved"


def test_lost_connections_end_all(shared: Place) -> None:
    """As when the machine on which a person typed the command is gone."""
    before = shared.checkpointed()
    _, ended = suffer(shared, faults.lose_connections, "deepspeed, pdsh and ssh killed (-9)", learns)
    assert ended.last is not None and ended.last < SAVE_SECONDS + GRACE_SECONDS
    assert shared.checkpointed() > before, "saved"


def test_a_network_mended_in_time_is_waited_for(shared: Place, one_host: list[str]) -> None:
    """And the run that has suffered all that ends with the weights of one that has not."""
    job = goes_on(shared)
    began, stood = time.monotonic(), shared.checkpointed()
    shared.hosts.cut("node2")
    time.sleep(TIMEOUT / 4)
    assert shared.checkpointed() <= stood + 2 * 4, "it goes on without the other host?"
    shared.hosts.mend("node2")
    job.wait_until(lambda: shared.checkpointed() > stood + 2 * 4)
    TABLE.append(
        f"{'network cut, mended after 5 s':<38}goes on: next but one checkpoint {time.monotonic() - began:.1f}"
    )
    assert job.wait(START_SECONDS) == 0, job.printed()
    assert shared.teachers() == one_host
    assert [shared.left(host) for host in HOSTS] == [[], []]


def test_a_lost_sidecar_host_is_waited_for(place: Place, one_host: list[str]) -> None:
    """Two trainers on one host, their teacher on the other; a small pool, so that they need it to the end."""
    job = place.deepspeed("--num_gpus 2", "replay.placement=external", "replay.pool_shards=4")
    job.wait_until(place.run.state.exists)
    place.teacher("node2")
    job.wait_until(lambda: place.checkpointed() >= STEPS + 4)
    began = time.monotonic()
    place.hosts.kill_host("node2")
    time.sleep(TIMEOUT)
    assert job.process.poll() is None, job.printed()
    assert place.checkpointed() < 2 * STEPS, "it needed the teacher no more"
    place.hosts.revive("node2")
    teacher = place.teacher("node2")
    assert job.wait(START_SECONDS) == 0, job.printed()
    assert teacher.wait(START_SECONDS) == 0, teacher.printed()
    lost = time.monotonic() - began
    starved = json.loads(place.run.metrics.read_text())["cost"]["starved_seconds"]
    TABLE.append(f"{'the host of an external sidecar lost':<38}goes on: starved {starved:.1f} in all, ended {lost:.1f}")
    assert starved > TIMEOUT / 2
    assert place.teachers() == one_host


def test_a_job_whose_command_was_killed_holds_its_run_until_it_is_told_to_stop(place: Place) -> None:
    """pdsh keeps it alive; the same command again is refused and names the process that takes a SIGTERM."""
    words = ("--hostfile hostfile1", "replay.placement=external", "replay.timeout=900")
    job = place.deepspeed(*words)
    job.wait_until(place.run.state.exists)  # from here it waits for a teacher
    faults.kill_command(place)
    again = place.deepspeed(*words)
    assert again.wait(START_SECONDS) == 2, again.printed()
    holders = re.findall(r"error: .* a live run holds this directory \(process (\d+) on node1\)", again.printed())
    assert len(holders) == 1, again.printed()

    place.teacher("node2")
    job.wait_until(lambda: place.checkpointed() >= STEPS + 4)
    place.hosts.run("node1", f"kill -TERM {holders[0]}")
    assert job.wait(SAVE_SECONDS + GRACE_SECONDS) is not None, "its connection lasts as long as pdsh does"
    assert not any(place.processes(host, "deepspeed", "train.py", "pdsh") for host in HOSTS)
    assert "stopped and saved in task 2 after" in job.printed(), "pdsh writes on"
    assert not place.run.metrics.exists(), "too late: the run had ended"
