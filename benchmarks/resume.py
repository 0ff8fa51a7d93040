"""kill -9 of a whole job half-way, then the same command: same result, less time than a run from zero.

python benchmarks/resume.py [--config digits.yaml] [--json FILE] [section.key=value ...]

Runs the configuration undisturbed, then again under another name, kills every process of that job at the same moment
once half of the tasks are learnt, and gives the command once more. Exit code 1 where a claim does not hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from trainer.cli import Parser, run_main
from trainer.run import RunDir
from trainer.settings import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "diffusers", "numpy")


def start(config: str, overrides: list[str], name: str) -> subprocess.Popen[bytes]:
    """The job as a person starts it, in a session of its own."""
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
    command = [*launcher, str(ROOT / "launch" / "train.py"), "--config", config, *overrides, f"run.name={name}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def timed(config: str, overrides: list[str], name: str) -> float:
    """Seconds until the command ends."""
    began = time.monotonic()
    start(config, overrides, name).wait()
    return time.monotonic() - began


def kill_half_way(config: str, overrides: list[str], name: str, sign: Path) -> tuple[float, int]:
    """Kill everything once `sign` exists; seconds until then and the number of processes killed."""
    began = time.monotonic()
    process = start(config, overrides, name)
    while not sign.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the job ended by itself with code {process.returncode}")
        time.sleep(0.05)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)
    return time.monotonic() - began, len(family)


def weights(run: RunDir, tasks: int) -> str:
    """sha256 of the last task's weights."""
    return json.loads((run.teacher(tasks) / "card.json").read_bytes())["teacher_id"]


def shape(run: RunDir) -> dict[str, list[int]]:
    """Row lengths of each matrix of metrics.json."""
    matrices: dict[str, list[list[float]]] = json.loads(run.metrics.read_bytes())["matrix"]
    return {name: [len(row) for row in matrix] for name, matrix in matrices.items()}


def main(argv: list[str]) -> int:
    """Measure, print, and judge."""
    parser = Parser(description="Kill a job half-way, resume it, compare with an undisturbed one.")
    parser.add_argument("--config", default="digits.yaml", metavar="FILE", help="a path, or a name in configs/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the file")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, options.overrides)
    tasks = len(config.data.tasks)
    runs = {name: RunDir(Path(config.run.dir) / name) for name in ("resume-whole", "resume-killed")}
    for run in runs.values():
        shutil.rmtree(run.root, ignore_errors=True)
    whole, killed = runs.values()
    seconds = {"whole": timed(options.config, options.overrides, whole.root.name)}
    sign = killed.teacher(max(1, tasks // 2)) / "card.json"
    seconds["until_kill"], processes = kill_half_way(options.config, options.overrides, killed.root.name, sign)
    seconds["resumed"] = timed(options.config, options.overrides, killed.root.name)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/resume.py", *argv]),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "processes_killed": processes,
        "same_weights": weights(whole, tasks) == weights(killed, tasks),
        "same_matrix_shape": shape(whole) == shape(killed),
        "faster_than_from_zero": seconds["resumed"] < seconds["whole"],
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["same_weights"] and result["same_matrix_shape"] and result["faster_than_from_zero"] else 1


if __name__ == "__main__":
    run_main(main)
