"""Two hosts for all tests of this folder, and the table of what befell them, at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults import TABLE
from .hosts import TwoHosts, lacking, two_hosts
from .jobs import SETTINGS, START_SECONDS, Place


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Both up; skipped, with the reason, where that cannot be."""
    reason = lacking()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts") / "hosts") as hosts:
        yield hosts


@pytest.fixture(scope="session")
def one_host(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The teachers of an undisturbed run of two ranks on one host."""
    place = Place(hosts, tmp_path_factory.mktemp("one-host") / "place")
    job = place.deepspeed("--num_gpus 2")
    assert job.wait(START_SECONDS) == 0, job.printed()
    return place.teachers()


@pytest.fixture
def place(hosts: TwoHosts, tmp_path: Path) -> Iterator[Place]:
    """An empty folder; afterwards nothing runs on the hosts."""
    place = Place(hosts, tmp_path / "place", SETTINGS)
    yield place
    place.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("seconds after a fault until nothing of the job ran")
        for row in TABLE:
            terminalreporter.write_line(row)
