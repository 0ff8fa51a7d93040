"""The real command on tiny tasks of real digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from .zygote import ROOT, Job, Ranks, free_port, start_server

TINY: dict[str, Any] = {
    "data": {"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1},
    "model": {"channels": [8, 8], "norm_groups": 4},
    "train": {"images_per_task": 192, "global_batch": 16, "log_every": 2, "threads": 1},
    "replay": {"steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16, "sampler_batch": 16, "timeout": 90},
    "evaluation": {"samples": 48, "steps": 3, "classifier_epochs": 1, "grid_per_class": 2},
    "checkpoint": {"every_images": 32},
}
TASKS = "data.tasks=[[0,1],[2,3]]"
COLD = (sys.executable,)  # a `launcher` that starts one new interpreter
TRAIN = ("--config", "tiny.yaml")


@dataclass
class Workplace:
    """A folder with the tiny configuration, in which commands are run as a person would.

    Without a launcher they are forked from a process that has imported everything (see `zygote`).
    """

    path: Path
    settings: Mapping[str, Any] = field(default_factory=lambda: TINY)
    started: list[subprocess.Popen[str] | Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "output").mkdir(parents=True)
        (self.path / "tiny.yaml").write_text(yaml.safe_dump(dict(self.settings)))

    def start(self, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str] | Job:
        """Train, in one process or with a launcher's command line."""
        if not launcher:
            return self.fork("train.py", *TRAIN, *arguments)
        return self.spawn([*launcher, str(ROOT / "launch" / "train.py"), *TRAIN, *arguments])

    def ranks(self, count: int, *arguments: str) -> Ranks:
        """Train on forked ranks, which need no launcher to meet."""

        def start(environ: Mapping[str, str], own: Sequence[str]) -> Job:
            return self.fork("train.py", *own, *TRAIN, *arguments, environ=environ)

        return Ranks(start, count)

    def fork(self, script: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Job:
        """Start an entry point of launch/."""
        output = self.path / "output" / str(len(self.started))
        job = Job(script, arguments, self.path, output, environ or {})
        self.started.append(job)
        return job

    def spawn(self, command: list[str]) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        process = subprocess.Popen(
            command,
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, launcher: tuple[str, ...] = (), timeout: float = 150) -> tuple[int, str]:
        """Exit code and all that was printed."""
        return finish(self.start(*arguments, launcher=launcher), timeout)

    def tool(self, script: str, *arguments: str) -> tuple[int, str]:
        """Run another entry point; exit code and all that was printed."""
        return finish(self.fork(script, *arguments), 120)

    def metrics(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / "runs" / name / "metrics.json").read_text())

    def teacher_id(self, name: str, task: int) -> str:
        """sha256 of the weights after a task."""
        card = self.path / "runs" / name / "tasks" / str(task) / "teacher" / "card.json"
        return json.loads(card.read_text())["teacher_id"]

    def processes(self) -> list[psutil.Process]:
        """Whatever works in this folder, started here or by what was started here."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()) == self.path and process.pid != os.getpid():
                    found.append(process)
        return found

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def finish(process: subprocess.Popen[str] | Job, timeout: float) -> tuple[int, str]:
    """Wait; exit code and all that was printed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode is not None
    return process.returncode, output


@pytest.fixture(scope="session")
def zygote() -> None:
    """Needed by whatever forks jobs."""
    start_server()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, zygote: None) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("end-to-end") / "workplace")
    yield place
    place.close()


@pytest.fixture(scope="session")
def deepspeed() -> Callable[[int], tuple[str, ...]]:
    """The launcher's command line for a number of ranks."""

    def command(ranks: int) -> tuple[str, ...]:
        script = Path(sys.executable).parent / "deepspeed"
        return (sys.executable, str(script), "--num_gpus", str(ranks), "--master_port", str(free_port()))

    return command


def wait_until_published(path: Path, process: subprocess.Popen[str] | Job, seconds: float = 90) -> None:
    """Wait for a file of a run that is going on."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.02)
