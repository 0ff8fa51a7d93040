"""A real S3 server for the tests of this directory, and the command run against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.store.s3 import S3Server, make_server, missing

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "palimpsest-tests"
TASKS = "data.tasks=[[0,1],[2,3]]"
TINY: dict[str, Any] = {
    "data": {"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1, "shard_size": 100},
    "model": {"channels": [8, 8], "norm_groups": 4},
    "train": {"images_per_task": 192, "global_batch": 16, "log_every": 2, "threads": 1},
    "replay": {"steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16, "sampler_batch": 16, "timeout": 90},
    "evaluation": {"samples": 48, "steps": 3, "classifier_epochs": 1, "grid_per_class": 2, "loss_images": 0},
    "checkpoint": {"every_images": 64},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Started, with an empty bucket."""
    pytest.importorskip("s3fs", reason="pip install 'palimpsest[s3]'")
    if why := missing():
        pytest.skip(why)
    running = make_server(tmp_path_factory.mktemp("s3"))
    try:
        running.start()
        with patched(running.environment):
            make_bucket(BUCKET)
        yield running
    finally:
        running.close()


class patched:
    """Environment variables for a while."""

    def __init__(self, changes: dict[str, str]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        self.old = {name: os.environ.get(name) for name in self.changes}
        os.environ.update(self.changes)

    def __exit__(self, *error: object) -> None:
        for name, value in self.old.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def make_bucket(name: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)


@pytest.fixture
def s3(server: S3Server) -> Iterator[S3Server]:
    """The server, with this process' environment set for it."""
    with patched(server.environment):
        yield server


@dataclass
class Workplace:
    """A folder with the tiny configuration, in which the commands are run as a person would."""

    path: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        variables = os.environ | self.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.path,
            env=variables | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def train(self, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        train = str(ROOT / "launch" / "train.py")
        return self.start(train, "--config", "tiny.yaml", TASKS, "data.cache_dir=cache", *overrides, **environment)

    def teacher_id(self, name: str) -> str:
        card = self.path / "runs" / name / "tasks" / "2" / "teacher" / "card.json"
        return json.loads(card.read_text())["teacher_id"]

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="session")
def workplace(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("work"), server.environment)
    yield place
    place.close()


@pytest.fixture(scope="session")
def url(workplace: Workplace) -> str:
    """Where the shards of the digits lie; they were built and sent as a person would."""
    build = ["-m", "data_tools", "build", "--source", "digits", "--out", "digits", "--shard-size", "100"]
    finish(workplace.start(*build, "--tasks", "[[0,1],[2,3]]"))
    url = f"s3://{BUCKET}/digits"
    _, said = finish(workplace.start("-m", "data_tools", "upload", "digits", url))
    assert "shards of" in said, said
    return url


Finish = Callable[..., tuple[int, str]]


def finish(process: subprocess.Popen[str], timeout: float = 240, code: int = 0) -> tuple[int, str]:
    """Exit code and all that was printed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return process.returncode, output
