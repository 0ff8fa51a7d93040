"""The real command on tiny tasks of real digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "data": {"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1},
    "model": {"channels": [8, 8], "norm_groups": 4},
    "train": {"images_per_task": 192, "global_batch": 16, "log_every": 2, "threads": 1},
    "replay": {"steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16, "sampler_batch": 16, "timeout": 90},
    "evaluation": {"samples": 48, "steps": 3, "classifier_epochs": 1, "grid_per_class": 2},
    "checkpoint": {"every_images": 32},
}
TASKS = "data.tasks=[[0,1],[2,3]]"


@dataclass
class Workplace:
    """A folder with the tiny configuration, in which commands are run as a person would."""

    path: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Train; `launcher` empty: one process without a launcher."""
        command = [*(launcher or (sys.executable,)), str(ROOT / "launch" / "train.py"), "--config", "tiny.yaml"]
        return self.spawn([*command, *arguments])

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
        process = self.start(*arguments, launcher=launcher)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def tool(self, script: str, *arguments: str) -> tuple[int, str]:
        """Run another entry point; exit code and all that was printed."""
        process = self.spawn([sys.executable, str(ROOT / "launch" / script), *arguments])
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def metrics(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / "runs" / name / "metrics.json").read_text())

    def teacher_id(self, name: str, task: int) -> str:
        """sha256 of the weights after a task."""
        card = self.path / "runs" / name / "tasks" / str(task) / "teacher" / "card.json"
        return json.loads(card.read_text())["teacher_id"]

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    path = tmp_path_factory.mktemp("workplace")
    (path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    place = Workplace(path)
    yield place
    place.close()


@pytest.fixture(scope="session")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[str, ...]]:
    """The launcher's command line for a number of ranks."""
    import socket

    def command(ranks: int) -> tuple[str, ...]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = Path(sys.executable).parent / "deepspeed"
        return (sys.executable, str(script), "--num_gpus", str(ranks), "--master_port", str(port))

    return command


def wait_until_published(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait for a file of a run that is going on."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.02)
