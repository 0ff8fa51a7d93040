"""The real command over two hosts, on tiny tasks of real digits: start it, look at it, see what is left of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from trainer.position import checkpoints
from trainer.run import RunDir

from .hosts import HOSTS, TwoHosts

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
STEPS = 80  # of each of the two tasks
TIMEOUT = 20.0  # cluster.timeout, in seconds
START_SECONDS = 900.0  # for processes of a busy machine to import what they need, and to come to a checkpoint
SETTINGS: dict[str, Any] = {
    "run": {"name": "run"},
    "data": {
        **{"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1},
        "tasks": [[0, 1], [2, 3]],
    },
    "model": {"channels": [8, 8], "norm_groups": 4},
    # As many threads on one host as on two: how many share a sum decides its last bits.
    "train": {"images_per_task": STEPS * 16, "global_batch": 16, "log_every": 2, "threads": 1},
    "zero": {"stage": 2},
    "replay": {"steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16, "sampler_batch": 16, "timeout": 240},
    "evaluation": {"samples": 48, "steps": 3, "classifier_epochs": 1, "grid_per_class": 2},
    "checkpoint": {"every_images": 4 * 16},
    "tracking": {"progress": False},
}
SHORT = {"cluster": {"timeout": TIMEOUT}}  # beside these, for jobs that something befalls
# ssh gives up a silent host when the ranks do, so that pdsh, and `deepspeed` with it, ends as they do.
ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=4"
OURS = (
    "deepspeed",
    "train.py",
    "teacher.py",
    "trainer.replay",
    "pdsh",
    "bare_rank.py",
)  # in the command lines of a job's processes


class Place:
    """A folder that both hosts see, with a configuration and hostfiles, in which commands are started."""

    def __init__(self, hosts: TwoHosts, path: Path, settings: Mapping[str, Any] = SETTINGS) -> None:
        self.hosts, self.path = hosts, path
        self.run = RunDir(path / "runs" / settings["run"]["name"])
        self._logs = 0
        path.mkdir(parents=True)
        (path / "tiny.yaml").write_text(yaml.safe_dump(dict(settings)))
        for slots in (1, 2):
            (path / f"hostfile{slots}").write_text("".join(f"{host} slots={slots}\n" for host in HOSTS))
        (path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")

    def deepspeed(self, flags: str, *settings: str, host: str = "node1", alive: str = ALIVE) -> Job:
        """`deepspeed FLAGS launch/train.py --config tiny.yaml SETTINGS` on a host."""
        train = ROOT / "launch" / "train.py"
        return self.start(
            f"{SCRIPTS / 'deepspeed'} {flags} {train} --config tiny.yaml {shlex.join(settings)}", host, alive
        )

    def teacher(self, host: str, *flags: str) -> Job:
        """`launch/teacher.py` beside the run, on a host."""
        return self.start(
            f"{sys.executable} {ROOT / 'launch' / 'teacher.py'} --run {self.run.root} {shlex.join(flags)}", host
        )

    def start(self, words: str, host: str, alive: str = ALIVE) -> Job:
        """Any command, in this folder on a host."""
        self._logs += 1
        environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PDSH_SSH_ARGS_APPEND": alive}
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in environ.items() if value)
        log = self.path / f"log-{self._logs}"
        return Job(self.hosts.start(host, f"exec env {given} {words}", log, self.path), log)

    def teachers(self) -> list[str]:
        """sha256 of the weights after each task."""
        cards = [self.run.teacher(task) / "card.json" for task in (1, 2)]
        return [json.loads(card.read_text())["teacher_id"] for card in cards]

    def checkpointed(self) -> int:
        """Steps up to the newest checkpoint, over both tasks."""
        task, step = next(iter(checkpoints(self.run, 2)), (0, 0))
        return max(0, (task - 1) * STEPS + step)

    def processes(self, host: str, *words: str) -> list[int]:
        """Ids, on the machine, of the processes on a host whose command lines hold one of some words."""
        return sorted(pid for pid, line in self.hosts.running(host).items() if any(word in line for word in words))

    def left(self, host: str) -> list[int]:
        """Processes of a job that still run on a host."""
        return self.processes(host, *OURS)

    def end(self) -> None:
        """End whatever of a job still runs, on hosts that are up and joined again."""
        for host in HOSTS:
            if not self.hosts.is_up(host):
                self.hosts.revive(host)
            self.hosts.mend(host)
            for pid in self.left(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Job:
    """A command that was started on a host."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it still runs after so long."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_until(self, happened: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait for something that must happen while the command runs."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"it ended:\n{self.printed()}"
            assert time.monotonic() < end, f"it did not happen within {seconds} s:\n{self.printed()}"
            time.sleep(0.05)

    def kill(self) -> None:
        """End the ssh client that has started it."""
        self.process.kill()
        self.process.wait()


def leftovers() -> list[str]:
    """What two hosts of this process have left on the machine: network namespaces and their folders."""
    names = [
        path for folder in ("/run/netns", "/etc/netns") if Path(folder).exists() for path in Path(folder).iterdir()
    ]
    return [str(path) for path in names if path.name.startswith(f"pal{os.getpid()}x")]
