"""The first process of a container: signals reach the ranks, nothing is left behind, the exit code tells the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from trainer.config import Config
from trainer.container import NOT_FOUND, UNFINISHED, is_finished
from trainer.settings import as_plain

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 60
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux containers")

# Stands where DeepSpeed's launcher does: starts a rank and gives it no time once it is told to stop itself.
LAUNCHER = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "rank.py"])
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), sys.exit(1)))
sys.exit(rank.wait())
"""
# Takes a second to save, as a rank does, then ends well.
RANK = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def start(tmp_path: Path, *words: str, run: Path | None = None) -> subprocess.Popen[str]:
    options = [] if run is None else ["--run", str(run)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "container.py"), *options, *words],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PALIMPSEST_RUN"} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> int:
    """The exit code."""
    process.communicate(timeout=SECONDS)
    return process.returncode


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def configuration(tasks: int, classifier_epochs: int = 0) -> Config:
    config = Config()
    config.data.tasks = [[2 * task, 2 * task + 1] for task in range(tasks)]
    config.classifier.epochs = classifier_epochs
    return config


def write_run(root: Path, tasks: int, learnt: int, config: Config | None = None) -> Path:
    """A run directory as it is after so many tasks of so many."""
    config = config or configuration(tasks)
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    if learnt:
        content = {"tasks": learnt, "final": {"fd": 1.0, "classifier": None}}
        (root / "metrics.json").write_text(json.dumps(content))
    return root


def test_a_stop_reaches_the_ranks_and_not_their_launcher(tmp_path: Path) -> None:
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").touch()
    (package / "launch.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    runner = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'deepspeed.launcher.launch']))"
    process = start(tmp_path, sys.executable, "-c", runner, run=write_run(tmp_path / "run", 5, 0))
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert end(process) == UNFINISHED
    assert (tmp_path / "saved").exists()


def test_what_is_no_launcher_is_signalled_itself(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    process = start(tmp_path, sys.executable, "rank.py")
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert end(process) == 0
    assert (tmp_path / "saved").exists()


def test_waits_for_what_the_command_left_behind(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    code = "import subprocess, sys, time, os; subprocess.Popen([sys.executable, 'rank.py'])\n"
    code += "while not os.path.exists('ready'): time.sleep(0.05)\nos._exit(7)"
    assert end(start(tmp_path, sys.executable, "-c", code)) == 7
    assert (tmp_path / "saved").exists(), "the rank was told, and waited for"
    left = [process for process in psutil.process_iter(["cmdline"]) if "rank.py" in (process.info["cmdline"] or [])]
    assert [process for process in left if process.cwd() == str(tmp_path)] == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["no-such-command"], NOT_FOUND),
        ([], 2),
    ],
)
def test_without_a_run_the_commands_code_is_passed_on(tmp_path: Path, words: list[str], code: int) -> None:
    assert end(start(tmp_path, *words)) == code


@pytest.mark.parametrize(
    ("learnt", "command", "code"),
    [
        (2, "exit 0", 0),
        (1, "exit 0", UNFINISHED),  # of before a task was appended
        (0, "exit 0", UNFINISHED),  # as ranks end that were told to stop
        (0, "exit 2", 2),
        (2, "exit 2", 2),  # an appended task that was refused
        (0, "exit 1", 1),
    ],
)
def test_with_a_run_the_result_decides(tmp_path: Path, learnt: int, command: str, code: int) -> None:
    run = write_run(tmp_path / "run", 2, learnt)
    assert end(start(tmp_path, "sh", "-c", command, run=run)) == code


def test_a_run_that_was_never_begun_is_not_finished(tmp_path: Path) -> None:
    assert end(start(tmp_path, "true", run=tmp_path / "run")) == UNFINISHED


@pytest.mark.parametrize(("learnt", "epochs"), [(2, 0), (2, 3), (1, 0), (0, 0)])
def test_finished_is_what_the_runs_own_configuration_asks_for(tmp_path: Path, learnt: int, epochs: int) -> None:
    run = write_run(tmp_path / "run", 2, learnt, configuration(2, epochs))
    assert is_finished(run) == (learnt == 2 and not epochs)
