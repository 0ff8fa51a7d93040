"""The health check: progress that is young enough and of this start, for trainers and for samplers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.health import judge
from trainer.run import RunDir

ROOT = Path(__file__).resolve().parent.parent.parent


def touch(path: Path, age: float) -> None:
    """A file that was changed so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (time.time() - age, time.time() - age))


def good(root: Path, worker: int | None = None, started: float = 10_000) -> bool:
    """Of a container that was started so many seconds ago; progress must be younger than 100 s."""
    return judge([RunDir(root)], worker, 100, time.time() - started).good


def test_a_run_that_has_written_nothing_is_not_well(tmp_path: Path) -> None:
    assert not good(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert not good(tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "state.json", "metrics.json", "tasks/3/replay/progress.json", "tasks/3/evaluation.json"],
)
def test_each_sign_counts_while_it_is_young(tmp_path: Path, name: str) -> None:
    touch(tmp_path / name, 20)
    for path in (tmp_path / name).parents:
        if tmp_path in path.parents:
            os.utime(path, (time.time() - 500, time.time() - 500))
    if name == "tasks/3/evaluation.json":  # known by its directory
        os.utime(tmp_path / "tasks" / "3", (time.time() - 20, time.time() - 20))
    assert good(tmp_path)
    for path in [tmp_path / name, *(tmp_path / name).parents]:
        if tmp_path in path.parents:
            os.utime(path, (time.time() - 500, time.time() - 500))
    assert not good(tmp_path)


def test_what_an_earlier_start_left_does_not_count(tmp_path: Path) -> None:
    touch(tmp_path / "metrics.jsonl", 20)
    assert good(tmp_path, started=30)
    assert not good(tmp_path, started=10)


def test_a_published_checkpoint_counts(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "1" / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert good(tmp_path)


def test_a_sampler_is_judged_by_its_own_heartbeat(tmp_path: Path) -> None:
    touch(tmp_path / "metrics.jsonl", 20)
    assert not good(tmp_path, worker=0)
    touch(tmp_path / "samplers" / "sampler-0.json", 20)
    assert good(tmp_path, worker=0)
    assert not good(tmp_path, worker=1)
    (tmp_path / "metrics.jsonl").unlink()
    assert not good(tmp_path)


def test_the_command_says_why(tmp_path: Path) -> None:
    def ask(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "health.py"), *words],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PALIMPSEST_RUN"}
            | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, said = ask("--run", "runs/first")
    assert (code, said[:15]) == (1, "no progress yet")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "metrics.jsonl").touch()
    for words in (("--run", "runs/first"), ()):  # any run will do where none is named
        code, said = ask(*words)
        assert code == 0, said
        assert "runs/first/metrics.jsonl" in said
    assert ask("--within", "0")[0] == 2
