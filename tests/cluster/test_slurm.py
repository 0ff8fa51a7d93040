"""launch/slurm/train.sbatch as jobs of a real Slurm on two hosts: preempted, told to stop, refused; and the weights.

Each node gives one trainer and one teacher. The reference is `deepspeed --num_gpus` on one host, with as many trainers.
What the batch script decides is also tested on jobs that only pretend to train, which start in a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.position import checkpoints
from trainer.run import RunDir

from .hosts import HOSTS, lacking
from .slurm import Slurm, slurm_cluster, slurm_lacking

ROOT = Path(__file__).resolve().parents[2]
SBATCH = "launch/slurm/train.sbatch"
STEPS = 100  # of each of the two tasks
SECONDS = 600.0  # that anything waited for may take on a busy machine
SETTINGS: dict[str, Any] = {
    "data": {
        **{"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1},
        "tasks": [[0, 1], [2, 3]],
    },
    "model": {"channels": [8, 8], "norm_groups": 4},
    "train": {"images_per_task": STEPS * 16, "global_batch": 16, "log_every": 10, "threads": 1},
    "zero": {"stage": 2},
    "replay": {
        **{"placement": "ranks", "steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16},
        **{"sampler_batch": 16, "timeout": 120},
    },
    "evaluation": {"samples": 8, "steps": 1, "classifier_epochs": 1, "grid_per_class": 1},
    "checkpoint": {"every_images": 10 * 16},
    "tracking": {"progress": False},
}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path: that of munge's socket may have 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="pal-slurm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def slurm(place: Path) -> Iterator[Slurm]:
    if reason := lacking() or slurm_lacking():
        pytest.skip(reason)
    with slurm_cluster(place) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(slurm: Slurm, place: Path) -> list[str]:
    """The models of a run that no scheduler has anything to do with."""
    write_config(place)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "3", "--master_port", "29711"]
    command = [*launcher, "launch/train.py", *arguments(place, "reference")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (place / "reference.log").open("wb") as log:
        launch = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        code = launch.wait(SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launch.pid, signal.SIGKILL)
    assert code == 0, (place / "reference.log").read_text()
    return models(place, "reference")


def write_config(place: Path) -> None:
    (place / "tiny.yaml").write_text(
        yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"root": str(place / "data")}})
    )


def arguments(place: Path, name: str, *settings: str) -> list[str]:
    return ["--config", str(place / "tiny.yaml"), f"run.dir={place}/runs", f"run.name={name}", *settings]


def submit(slurm: Slurm, place: Path, name: str, *settings: str, python: str = sys.executable) -> int:
    """Submit the job of a run, as a person would from the project's directory, with two ranks on each node."""
    environment = {"PALIMPSEST_PYTHON": python, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    exported = shlex.quote(",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())]))
    options = f"--export={exported} --nodes=2 --ntasks-per-node=2 --output={place}/{name}.log"
    return slurm.submit(f"{options} {SBATCH} {' '.join(arguments(place, name, *settings))}", ROOT)


def models(place: Path, name: str) -> list[str]:
    """sha256 of the weights after each task."""
    cards = [RunDir(place / "runs" / name).teacher(task) / "card.json" for task in (1, 2)]
    return [json.loads(card.read_text())["teacher_id"] for card in cards]


def ended(job: dict[str, str]) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def restarted(times: int) -> Callable[[dict[str, str]], bool]:
    return lambda job: ended(job) or (int(job["Restarts"]) == times and job["JobState"] == "RUNNING")


def said(place: Path, name: str, number: int) -> str:
    """All that a job has said: the batch script, Slurm, the ranks."""
    logs = sorted((place / "runs" / name / "logs" / f"slurm-{number}").glob("*"))
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in [place / f"{name}.log", *logs])


def nothing_left(slurm: Slurm) -> bool:
    """Whether neither host runs anything of a job, after a moment."""
    for _ in range(20):
        if not any(slurm.hosts.processes(host, word) for host in HOSTS for word in ("launch/", "trainer.replay")):
            return True
        time.sleep(0.5)
    return False


def wait_for_step(slurm: Slurm, place: Path, name: str, number: int, wanted: tuple[int, int]) -> None:
    """Wait until a run has a checkpoint of this task and step, or a later one."""
    run, deadline = RunDir(place / "runs" / name), time.monotonic() + SECONDS
    while not [found for found in checkpoints(run, 2) if found >= wanted]:
        assert not ended(slurm.job(number)) and time.monotonic() < deadline, said(place, name, number)
        time.sleep(0.2)


def test_a_job_over_two_nodes_ends_with_the_weights_of_one_host(
    slurm: Slurm, place: Path, reference: list[str]
) -> None:
    number = submit(slurm, place, "whole")
    job = slurm.wait_for(number, ended, SECONDS)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), said(place, "whole", number)
    assert models(place, "whole") == reference
    assert nothing_left(slurm)


PRETENDER = """
import os, pathlib, runpy, signal, sys, time
if sys.argv[1].endswith("standing.py"):
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
settings = dict(word.split("=", 1) for word in sys.argv if "=" in word)
run = pathlib.Path(settings["run.dir"], settings["run.name"])
count = int(os.environ.get("SLURM_RESTART_COUNT", 0))

def save(*_):
    (run / f"tasks/1/checkpoints/step-{8 * count + 8:08d}").mkdir(parents=True, exist_ok=True)
    os._exit(0)

if run.name == "patient":
    signal.signal(signal.SIGTERM, save)
    (run / "up").touch()
elif count == 0:
    save()
elif os.environ["RANK"] == "1":
    sys.exit(1)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def pretender(place: Path) -> str:
    """A command that looks at a run as Python does, and does not train it."""
    (place / "pretender.py").write_text(PRETENDER)
    write_config(place)
    return f"{sys.executable} {place}/pretender.py"


def test_a_job_that_gets_no_further_fails_after_three_starts(slurm: Slurm, place: Path, pretender: str) -> None:
    """The first start leaves a checkpoint; the next three end with a crash, and the last of them for good."""
    number = submit(slurm, place, "crashing", python=pretender)
    job = slurm.wait_for(number, ended, SECONDS)
    told = said(place, "crashing", number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "3", "1:0"), told
    assert "3 starts have left nothing new" in told


def test_a_job_preempted_with_grace_goes_on_and_ends_when_cancelled(slurm: Slurm, place: Path, pretender: str) -> None:
    """In the grace time Slurm tells the ranks alone, and leaves the job running: it is the script that requeues."""
    slurm.run("scontrol update PartitionName=low GraceTime=60")
    up = place / "runs" / "patient" / "up"
    try:
        number = submit(slurm, place, "patient", python=pretender)
        wait_until(up.exists)
        up.unlink()
        urgent = slurm.submit("--partition=high --nodes=2 --exclusive --output=/dev/null --wrap true", place)
        slurm.wait_for(urgent, ended, SECONDS)
        wait_until(up.exists)
        assert "requeued" in (place / "patient.log").read_text().splitlines()
        slurm.run(f"scancel {number}")
        job = slurm.wait_for(number, ended, SECONDS)
        told = said(place, "patient", number)
        assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1"), told
        wait_until(lambda: "left to Slurm" in (place / "patient.log").read_text())
        assert nothing_left(slurm)
    finally:
        slurm.run("scontrol update PartitionName=low GraceTime=0")


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_preempted_and_then_told_to_stop_ends_with_the_same_weights(
    slurm: Slurm, place: Path, reference: list[str]
) -> None:
    number = submit(slurm, place, "moved")
    wait_for_step(slurm, place, "moved", number, (1, 10))
    urgent = slurm.submit("--partition=high --nodes=2 --exclusive --output=/dev/null --wrap 'sleep 1'", place)
    slurm.wait_for(urgent, ended, SECONDS)
    slurm.wait_for(number, restarted(1), SECONDS)
    wait_for_step(slurm, place, "moved", number, (2, 20))
    slurm.run(f"scancel --signal=USR1 {number}")  # what Slurm itself sends some time before the limit
    job = slurm.wait_for(number, lambda job: ended(job) and int(job["Restarts"]) == 2, SECONDS)
    told = said(place, "moved", number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), told
    assert "DUE TO PREEMPTION" in told
    assert len(re.findall(r"stopped and saved in task \d after \d+ images", told)) == 2, told
    assert models(place, "moved") == reference
    assert nothing_left(slurm)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("typo", "train.nonsense=1", "train.nonsense"),
        ("absent", "data.root=/nowhere data.source=npz data.source_path=/nowhere.npz", "/nowhere"),
    ],
)
def test_a_user_error_fails_the_job_and_is_not_tried_again(
    slurm: Slurm, place: Path, name: str, setting: str, message: str
) -> None:
    write_config(place)
    number = submit(slurm, place, name, *setting.split())
    job = slurm.wait_for(number, ended, SECONDS)
    told = said(place, name, number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), told
    assert message in (place / f"{name}.log").read_text(), told
    assert nothing_left(slurm)
