"""Two ranks under the real `deepspeed` command, any process of which may be killed: no orphan, and the same weights."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.position import checkpoints

from .conftest import TASKS, TINY, wait_until_published
from .endurance import SECONDS, Run

Launcher = Callable[[int], tuple[str, ...]]

STEPS = 100
SETTINGS: dict[str, Any] = TINY | {
    "train": TINY["train"] | {"images_per_task": STEPS * 16},
    "zero": {"stage": 2},
    "evaluation": {"samples": 8, "steps": 1, "classifier_epochs": 1, "grid_per_class": 1},
    "checkpoint": {"every_images": 4 * 16},
    "tracking": {"progress": False},
}
SIGNS = {"launcher": "deepspeed.launcher.launch", "rank": "--local_rank=1"}  # by which a process is known


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, zygote: None) -> list[str]:
    """The teachers of a run that nobody disturbs."""
    run = Run(tmp_path_factory.mktemp("twin") / "twin", SETTINGS, steps=STEPS, sampler=True)
    try:
        return go_on(run)
    finally:
        run.place.close()


def go_on(run: Run) -> list[str]:
    """Run to the end, on forked ranks; the teachers."""
    run.start(2, "replay.placement=external")
    run.conclude()
    return [run.place.teacher_id("run", task) for task in (1, 2)]


def send(run: Run, victim: str, runner: int, number: int) -> None:
    """Signal one process of the job (the command a person sees, deepspeed's launcher below it, the second rank) or
    all."""
    for process in run.place.processes():
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if victim == "all" or (process.pid == runner if victim == "runner" else SIGNS[victim] in line):
                process.send_signal(number)


def wait_until_gone(run: Run) -> list[psutil.Process]:
    """What is left of a job after a while."""
    deadline = time.monotonic() + SECONDS
    while (left := run.place.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "placement", "ranks"),
    [("runner", "ranks", 3), ("launcher", "subprocess", 2), ("rank", "ranks", 3), ("all", "subprocess", 2)],
)
def test_killed_job_leaves_no_orphan_and_ends_with_the_same_weights(
    tmp_path: Path, deepspeed: Launcher, twin: list[str], victim: str, placement: str, ranks: int
) -> None:
    run = Run(tmp_path / "run", SETTINGS, steps=STEPS, sampler=True)
    try:
        process = run.place.start("run.name=run", TASKS, f"replay.placement={placement}", launcher=deepspeed(ranks))
        wait_until_published(run.directory.checkpoints(2) / "step-00000004", process)
        send(run, victim, process.pid, signal.SIGKILL)
        process.communicate(timeout=SECONDS)
        assert wait_until_gone(run) == []
        assert not run.directory.metrics.exists(), "killed too late"
        assert go_on(run) == twin
    finally:
        run.place.close()


@pytest.mark.parametrize(
    ("victim", "number", "placement", "ranks"),
    [
        ("runner", signal.SIGTERM, "subprocess", 2),
        pytest.param("runner", signal.SIGUSR1, "subprocess", 2, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGTERM, "subprocess", 2, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGUSR1, "ranks", 3, marks=pytest.mark.slow),
        pytest.param("rank", signal.SIGTERM, "ranks", 3, marks=pytest.mark.slow),
        pytest.param("rank", signal.SIGUSR1, "subprocess", 2, marks=pytest.mark.slow),
        pytest.param("all", signal.SIGTERM, "ranks", 3, marks=pytest.mark.slow),  # as a scheduler signals a job
        pytest.param("all", signal.SIGUSR1, "subprocess", 2, marks=pytest.mark.slow),
    ],
)
def test_signal_to_any_process_saves_and_says_how_to_go_on(
    tmp_path: Path, deepspeed: Launcher, twin: list[str], victim: str, number: int, placement: str, ranks: int
) -> None:
    run = Run(tmp_path / "run", SETTINGS, steps=STEPS, sampler=True)
    try:
        process = run.place.start("run.name=run", TASKS, f"replay.placement={placement}", launcher=deepspeed(ranks))
        wait_until_published(run.directory.checkpoints(2) / "step-00000004", process)
        send(run, victim, process.pid, number)
        output, _ = process.communicate(timeout=SECONDS)
        assert wait_until_gone(run) == []
        said = re.findall(r"stopped and saved in task 2 after (\d+) images; the same command goes on from here", output)
        assert len(said) == 1, output
        assert checkpoints(run.directory, 2)[0] == (2, int(said[0]) // 16)
        assert go_on(run) == twin
    finally:
        run.place.close()
