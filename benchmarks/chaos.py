"""A run under random faults against an undisturbed twin: the same weights, the same measures, nothing lost.

python benchmarks/chaos.py [--minutes 10] [--seed 1] [--ranks 1] [--faults N] [--json FILE] [section.key=value ...]

The twin comes first. Then the same configuration under another name, on a small disk of its own, is killed, stopped,
hung, damaged and starved of room by seeded chance (`benchmarks/attack/kinds.py` lists how), and the same command is
given again until the run is complete: once, or several times from zero while the minutes last. Exit code 0: every run
ended in time and like its twin, no process and no half-written file was left. The last line sums up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attack.disk import clear, may_mount, mount, unmount, unshare
from attack.job import Job
from attack.kinds import KINDS, Deck
from attack.round import Lost, Round, complete
from attack.scene import Fault, Scene

from trainer.cli import Parser, positive, run_main
from trainer.replay.events import count_events
from trainer.run import RunDir
from trainer.settings import load_config

PACKAGES = ("torch", "deepspeed", "diffusers", "numpy")
# The digits in less than a minute, with checkpoints and replay shards every few steps.
SHORT = {
    "data.tasks": "[[0,1],[2,3],[4,5],[6,7]]",
    "train.images_per_task": "3072",
    "train.threads": "1",
    "checkpoint.every_images": "256",
    "replay.steps": "4",
    "replay.points_per_trajectory": "4",
    "replay.shard_trajectories": "16",
    "replay.sampler_batch": "16",
    "replay.on_starved": "wait",
    "evaluation.samples": "400",
    "evaluation.steps": "5",
    "evaluation.classifier_epochs": "2",
    "tracking.progress": "false",
}
CLEANUP_SECONDS = 5.0
SHORTEST_HANG = 8.0  # seconds; signs of life are an evaluation of the model, or a module imported, apart
SHORTEST_PAUSE = 0.4  # seconds between two faults
ROOM = 64 << 20  # bytes on the small disk beside three times what the twin has left: replay pools, logs


def main(argv: list[str], job_type: type[Job] = Job) -> int:
    """Run twin and rounds, tell, judge."""
    chaos = Chaos(parse(argv), job_type)
    try:
        chaos.play()
    except Lost as error:
        chaos.lost.append(str(error))
    finally:
        chaos.end()
    record = chaos.record() | {"command": " ".join(["python", "benchmarks/chaos.py", *argv])}
    if chaos.options.json:
        chaos.options.json.write_text(json.dumps(record, indent=1) + "\n")
    for line in chaos.summary(record):
        print(line, flush=True)
    return 1 if record["lost"] else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="A run under random faults against an undisturbed twin.")
    parser.add_argument("--config", default="digits.yaml", metavar="FILE", help="a path, or a name in configs/")
    parser.add_argument("--minutes", type=float, default=10.0, help="in which everything has ended, the twin too")
    parser.add_argument("--seed", type=int, default=1, help="of the order and the moments of the faults")
    parser.add_argument("--ranks", type=int, default=1, help="trainer ranks; 0: one process without a launcher")
    parser.add_argument("--faults", type=positive, default=10**6, metavar="N", help="at most so many, in one round")
    names = [kind.name for kind in KINDS]
    parser.add_argument("--only", action="append", choices=names, metavar="KIND", help="of faults; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record goes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the file")
    return parser.parse_intermixed_args(argv)


class Chaos:
    """The benchmark: its time, its faults, what was lost."""

    def __init__(self, options: argparse.Namespace, job_type: type[Job]) -> None:
        self.began = time.monotonic()
        self.options, self.job_type = options, job_type
        self.deadline = self.began + 60 * options.minutes - CLEANUP_SECONDS
        self.settings = settings(options.overrides)
        self.config = load_config(options.config, self.settings)
        self.tasks = len(self.config.data.tasks)
        self.limited = may_mount()
        # Of its own each: how long something takes changes neither the order of kinds nor the bytes that are damaged.
        order, self.moments, self.damage = (random.Random(f"{options.seed}/{name}") for name in "odm")
        self.deck = Deck(order, self._kinds())
        self.port = free_port()
        self.logs = self.run_dir("chaos-logs").root
        clear(self.logs)
        self.logs.mkdir(parents=True)
        self.jobs: list[Job] = []
        self.faults: list[Fault] = []
        self.noticed: Counter[str] = Counter()
        self.lost: list[str] = []
        self.twin_seconds = 0.0
        self.rounds = 0

    def play(self) -> None:
        """The twin, then rounds while there is time. Raises Lost."""
        twin = self.run_twin()
        while len(self.faults) < self.options.faults:
            if self.rounds and time.monotonic() + 3 * self.twin_seconds > self.deadline:
                break
            self.run_round(twin)

    def run_twin(self) -> RunDir:
        """The run that nothing happens to."""
        run, job = self._prepare("chaos-twin", [])
        self.tell("the undisturbed twin")
        job.start()
        while job.code is None:
            if time.monotonic() > self.deadline:
                raise Lost("the undisturbed twin did not end in time")
            time.sleep(0.1)
        self.twin_seconds = time.monotonic() - job.began
        if job.code != 0 or not complete(run, self.tasks):
            raise Lost(f"the undisturbed twin failed, see {job.log()}{job.last_word()}")
        self.tell(f"the twin took {self.twin_seconds:.1f} s")
        return run

    def run_round(self, twin: RunDir) -> None:
        """One run under attack, compared with the twin. Raises Lost."""
        self.rounds += 1
        hang = max(SHORTEST_HANG, self.twin_seconds / 3)
        run, job = self._prepare(f"chaos-{self.rounds}", [f"replay.hang_timeout={hang:.1f}"])
        if self.limited:
            run.root.mkdir(parents=True)
            mount(run.root, self._disk_size(twin))
        scene = Scene(job, run, self.tasks, self.damage, hang, self.limited)
        pause = max(SHORTEST_PAUSE, self.twin_seconds / 30)
        most = self.options.faults - len(self.faults)
        played = Round(scene, self.deck, self.moments, self.tell, pause, self.twin_seconds, self.deadline, most)
        self.tell(f"round {self.rounds}: a fault every {pause:.1f} s, a hung sampler is noticed after {hang:.0f} s")
        try:
            played.play()
            scene.lost += differences(twin, run, self.tasks) + litter(run)
            self.tell(f"round {self.rounds}: complete after {job.starts} starts, {len(played.faults)} faults")
        finally:
            self.lost += scene.lost
            self.faults += played.faults
            self.noticed.update(noticed(run))
            scene.end()
            self._put_away(run)

    def end(self) -> None:
        """Leave no process."""
        for job in self.jobs:
            job.kill()

    def tell(self, text: str, at: float | None = None) -> None:
        """One line for a person, with the moment it is about."""
        print(f"{(time.monotonic() if at is None else at) - self.began:6.1f} s  {text}", flush=True)

    def record(self) -> dict[str, Any]:
        """What the JSON file keeps."""
        lost = self.lost or ([] if self.faults else ["no fault was injected: too few --minutes"])
        return {
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {name: version(name) for name in PACKAGES},
            "ranks": self.options.ranks,
            "seconds": {"twin": round(self.twin_seconds, 1), "all": round(time.monotonic() - self.began, 1)},
            "rounds": self.rounds,
            "starts": sum(job.starts for job in self.jobs[1:]),
            "faults": dict(sorted(Counter(fault.kind for fault in self.faults).items())),
            "never": sorted({kind.name for kind in KINDS} - {fault.kind for fault in self.faults}),
            "noticed": {name: count for name, count in sorted(self.noticed.items()) if count},
            "tracebacks": [str(path) for path in sorted(self.logs.glob("*.txt")) if "Traceback" in path.read_text()],
            "lost": lost,
        }

    def summary(self, record: dict[str, Any]) -> list[str]:
        """For a person; the last line says it all."""
        named = ", ".join(f"{name} {count}" for name, count in record["faults"].items())
        lines = [f"noticed by the run: {record['noticed'] or 'nothing'}"]
        if record["never"]:
            lines.append(f"never injected: {', '.join(record['never'])}")
        if record["tracebacks"]:
            lines.append(f"ended with a traceback: {', '.join(record['tracebacks'])}")
        lines += [f"LOST: {text}" for text in record["lost"]]
        verdict = "same weights, nothing lost" if not record["lost"] else f"{len(record['lost'])} things LOST"
        many = f"{len(self.faults)} faults in {record['starts']} starts of {self.rounds} runs"
        return [*lines, f"chaos: {verdict}: {many} ({named})"]

    def _prepare(self, name: str, extra: list[str]) -> tuple[RunDir, Job]:
        """A run directory that does not exist yet, and its job."""
        run = self.run_dir(name)
        clear(run.root)
        arguments = ["--config", self.options.config, *self.settings, *extra, f"run.name={name}"]
        self.jobs.append(self.job_type(arguments, self.options.ranks, self.port, self.logs, name))
        return run, self.jobs[-1]

    def _put_away(self, run: RunDir) -> None:
        """Keep what was lost something of; give back the memory of its disk."""
        if self.lost:
            shutil.copytree(run.root, self.logs / run.root.name, dirs_exist_ok=True)
        unmount(run.root)

    def _disk_size(self, twin: RunDir) -> int:
        """Enough for the program's own check at the start, which counts the checkpoints that come and go."""
        return 3 * sum(path.stat().st_size for path in twin.root.rglob("*") if path.is_file()) + ROOM

    def _kinds(self) -> list[str]:
        """The kinds of faults that are asked for and possible here."""
        kinds = self.options.only or [kind.name for kind in KINDS]
        if not self.limited and "full disk" in kinds:
            self.tell("no full disk: neither root nor unshare -rm may mount a tmpfs here")
        out = set() if self.limited else {"full disk"}
        out |= set() if self.options.ranks else {"kill -9 launcher", "kill -9 runner"}
        return [name for name in kinds if name not in out]

    def run_dir(self, name: str) -> RunDir:
        return RunDir(Path(self.config.run.dir) / name)


def settings(overrides: list[str]) -> list[str]:
    """SHORT, then what the command line says; each key once."""
    given = {text.partition("=")[0]: text for text in overrides}
    return [*(f"{key}={value}" for key, value in SHORT.items() if key not in given), *given.values()]


def free_port() -> int:
    """A port that nobody listens on, below the range from which systems hand out ports."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def differences(twin: RunDir, run: RunDir, tasks: int) -> list[str]:
    """What of a complete run is not as in its twin."""
    lost = [f"{run.root}: other weights after task {k}" for k in range(1, tasks + 1) if card(twin, k) != card(run, k)]
    one, other = (json.loads(path.metrics.read_bytes()) for path in (twin, run))
    if one["matrix"] != other["matrix"]:
        lost.append(f"{run.root}: another matrix of measures")
    points = [content["cost"]["replay_points_used"] for content in (one, other)]
    if points[0] != points[1]:
        lost.append(f"{run.root}: {points[1]} replay points used, {points[0]} by the twin")
    return lost


def card(run: RunDir, task: int) -> str:
    """sha256 of a task's weights."""
    return json.loads((run.teacher(task) / "card.json").read_bytes())["teacher_id"]


def litter(run: RunDir) -> list[str]:
    """Half-written files that the last start has left."""
    names = [path for path in run.root.rglob(".*") if path.suffix in (".tmp", ".old")]
    return [f"{path}: left behind" for path in names]


def noticed(run: RunDir) -> dict[str, int]:
    """What the run itself has counted, by kind of event."""
    return count_events(run) if run.events("trainer").parent.exists() else {}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    unshare()
    run_main(main)
