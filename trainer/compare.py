"""Several methods and seeds of one configuration, each as a training run of its own, and what came of them.

Every run is the command a person would type (`deepspeed launch/train.py --config ... run.seed=...`), in a process group
of its own. A run succeeded if its `metrics.json` is complete: exit codes of launchers do not tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from trainer.cli import Parser, positive
from trainer.config import Config, MethodName
from trainer.errors import UserError
from trainer.run import RunDir
from trainer.settings import as_plain, find_config, load_config, refused_changes, restore_config
from trainer.standing import asked_for
from trainer.tracking.table import number_text

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")  # the `deepspeed` script, wherever it is installed
METRICS = ("fd", "kld", "accuracy", "forgetting")
GRACE = 40.0  # seconds between SIGTERM and SIGKILL: ranks save within 30
POLL = 0.1

# Keys that may differ between a finished run and the one asked for without making its numbers another run's.
INDIFFERENT = (
    *(
        "run.",
        "tracking.",
        "checkpoint.",
        "data.root",
        "data.source_path",
        "data.workers",
        "data.prefetch",
        "train.threads",
        "classifier.",
    ),
    *("train.compile_cache", "train.peak_tflops"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a method, or a variant with settings of its own."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What to compare; `command` is the line that asked for it."""

    config: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    out: Path
    overrides: tuple[str, ...] = ()
    num_gpus: int = 1
    jobs: int = 1
    mean: bool = False
    command: str = ""


@dataclass
class Run:
    """One training run of the comparison; `result` is its metrics.json, `error` why there is none."""

    row: str
    seed: int
    overrides: list[str]
    directory: RunDir
    log: Path
    tasks: int
    classifier: dict[str, Any] | None = None  # what the result must say of the classifier that learns the tasks
    result: dict[str, Any] | None = None
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    port: int
    started: float = field(default_factory=time.monotonic)


# --- the command line -------------------------------------------------------------------------------------------


def parse_comparison(argv: list[str]) -> Comparison:
    """The comparison a command line asks for.

    Raises:
        UserError: one line naming the option.
    """
    parser = Parser(prog="launch/compare.py", description="Train several methods and seeds; one table and one plot.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a path, or a name in configs/")
    parser.add_argument("--methods", default="", metavar="A,B,...", help="methods to compare")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:key=value,...",
        help="one more line of the table: the configuration with these settings (repeatable)",
    )
    parser.add_argument("--seeds", default="0", metavar="0,1,...", help="run.seed of each repetition")
    parser.add_argument("--out", default="", metavar="DIR", help="default: runs/compare-<config>")
    parser.add_argument("--num_gpus", type=positive, default=1, help="processes of each run, as deepspeed counts them")
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side, on the same devices")
    parser.add_argument("--mean", action="store_true", help="mean and standard deviation instead of median and range")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args(argv)
    rows = [Row(name, (f"method.name={name}",)) for name in _methods(options.methods)]
    rows += [parse_variant(text) for text in options.variant]
    if not rows:
        raise UserError("--methods: nothing to compare; give methods, variants or both")
    if len({row.name for row in rows}) < len(rows):
        raise UserError("--methods, --variant: a name occurs twice")
    _check_overrides(options.overrides, rows)
    return Comparison(
        config=options.config,
        rows=tuple(rows),
        seeds=_seeds(options.seeds),
        out=Path(options.out or Path("runs") / f"compare-{find_config(options.config).stem}"),
        overrides=tuple(options.overrides),
        num_gpus=options.num_gpus,
        jobs=options.jobs,
        mean=options.mean,
        command=shlex.join(["python", "launch/compare.py", *argv]),
    )


def parse_variant(text: str) -> Row:
    """`NAME:key=value,key=value`; commas inside brackets belong to the value."""
    name, colon, settings = text.partition(":")
    if not colon or not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise UserError(f"--variant {text}: is not of the form NAME:key=value,key=value")
    parts, depth = [""], 0
    for char in settings:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if not all("=" in part for part in parts):
        raise UserError(f"--variant {text}: is not of the form NAME:key=value,key=value")
    return Row(name, tuple(parts))


def _methods(text: str) -> list[str]:
    known = [method.value for method in MethodName]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--methods: unknown method {name}; known: {', '.join(known)}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text}: not whole numbers with commas between") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed occurs twice")
    return seeds


def _check_overrides(overrides: Sequence[str], rows: Sequence[Row]) -> None:
    own = {"run.name", "run.dir", "run.seed"}
    for override in [*overrides, *(setting for row in rows for setting in row.overrides)]:
        if override.partition("=")[0] in own:
            raise UserError(f"{override}: compare sets it itself; see --out and --seeds")
    if any(override.startswith("method.name=") for override in overrides):
        raise UserError("method.name: one method for all runs compares nothing; use --methods or --variant")


# --- the runs ---------------------------------------------------------------------------------------------------


def plan_runs(comparison: Comparison) -> list[Run]:
    """All runs, seed by seed, with the results of those that are finished already.

    Raises:
        UserError: a configuration that cannot run, or a run directory that holds a run with other settings.
    """
    runs = []
    for seed in comparison.seeds:
        for row in comparison.rows:
            name = f"{row.name}-seed{seed}"
            own = [f"run.dir={comparison.out}", f"run.name={name}", f"run.seed={seed}"]
            overrides = [*comparison.overrides, *row.overrides, *own]
            config = load_config(comparison.config, overrides)
            if not config.train.threads:
                overrides += _shared_threads(comparison, overrides)
            directory = RunDir(comparison.out / name)
            run = Run(
                row=row.name,
                seed=seed,
                overrides=overrides,
                directory=directory,
                log=comparison.out / "logs" / f"{name}.log",
                tasks=len(config.data.tasks),
                classifier=asked_for(config),
            )
            _check_settings(run, as_plain(config))
            run.result = _whole_result(run)
            runs.append(run)
    return runs


def _shared_threads(comparison: Comparison, overrides: Sequence[str]) -> list[str]:
    """The setting that shares the cores out between runs side by side: each alone would take all of them, and threads
    that wait for one another's cores are many times slower. Nothing where one run goes alone, or the user has a say."""
    if comparison.jobs == 1 or any(override.startswith("train.threads=") for override in overrides):
        return []
    cores = len(os.sched_getaffinity(0))
    return [f"train.threads={max(1, cores // (comparison.jobs * comparison.num_gpus))}"]


def _check_settings(run: Run, wanted: dict[str, Any]) -> None:
    path = run.directory.config
    if not path.exists():
        return
    held = restore_config(path)
    trained = read_result(run.directory, run.tasks) is not None
    changed = _differences(held, wanted) if trained else refused_changes(held, wanted)
    if changed:
        raise UserError(f"{path}: holds a run with other settings: {', '.join(changed)}; take another --out")


def _differences(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Keys in which a finished run differs. One that its file does not have is younger than it: its default counts."""
    before = {section: defaults | held.get(section, {}) for section, defaults in as_plain(Config()).items()}
    return [
        f"{section}.{key} ({before[section][key]} -> {value})"
        for section, values in wanted.items()
        for key, value in values.items()
        if not f"{section}.{key}".startswith(INDIFFERENT) and before[section][key] != value
    ]


def read_result(directory: RunDir, tasks: int) -> dict[str, Any] | None:
    """The run's metrics.json, or None where it is missing, torn or of fewer tasks: the run is not finished."""
    try:
        result = json.loads(directory.metrics.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or not isinstance(result.get("cost"), dict):
        return None
    rows, final = result.get("after_task"), result.get("final")
    complete = result.get("tasks") == tasks and isinstance(rows, list) and len(rows) == tasks
    return result if complete and isinstance(final, dict) and set(METRICS) <= set(final) else None


def _whole_result(run: Run) -> dict[str, Any] | None:
    """A run that is trained goes on where its classifier is still to be learnt, or another one is asked for."""
    result = read_result(run.directory, run.tasks)
    return result if result is not None and result["final"].get("classifier") == run.classifier else None


def run_all(comparison: Comparison, console: Console, launcher: Sequence[str] = LAUNCHER) -> list[Run]:
    """Start what is not finished, `comparison.jobs` at a time, and wait for it.

    The first run goes alone until it learns: it builds the data set and trains the classifier that all share.
    A failed run is named with its log, and the others go on. Whatever ends this function early (Ctrl-C, SIGTERM)
    ends its children first.
    """
    runs = plan_runs(comparison)
    waiting = [run for run in runs if run.result is None]
    console.print(f"{len(runs)} runs in {comparison.out}, {len(runs) - len(waiting)} of them finished", highlight=False)
    active: list[_Child] = []
    with _signals_interrupt():
        try:
            while waiting or active:
                while waiting and len(active) < (comparison.jobs if _prepared(runs) else 1):
                    active.append(_start(waiting.pop(0), comparison, launcher, {child.port for child in active}))
                    console.print(
                        f"{active[-1].run.name}: started, log {active[-1].run.log}", highlight=False, soft_wrap=True
                    )
                time.sleep(POLL)
                for child in [child for child in active if child.process.poll() is not None]:
                    active.remove(child)
                    _finish(child, console)
        finally:
            _stop(active)
    return runs


def _prepared(runs: Sequence[Run]) -> bool:
    """Whether some run has begun to learn: data set and classifier, which the runs share, are there then."""
    return any(run.result is not None or run.directory.state.exists() for run in runs)


def _start(run: Run, comparison: Comparison, launcher: Sequence[str], taken: set[int]) -> _Child:
    port = _free_port(taken)
    command = [*launcher, "--num_gpus", str(comparison.num_gpus), "--master_port", str(port), str(TRAIN)]
    command += ["--config", comparison.config, *run.overrides]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return _Child(run, process, port)


def _free_port(taken: set[int]) -> int:
    """A port nobody listens on now; `taken` are those of runs that may not listen yet."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


def _finish(child: _Child, console: Console) -> None:
    _stop([child])  # ranks that outlived their launcher still hold the run directory
    run, seconds = child.run, time.monotonic() - child.started
    run.result = _whole_result(run)
    if run.result is None:
        run.error = f"exit code {child.process.returncode}: {_last_words(run.log)}"
        console.print(f"{run.name}: [red]failed[/red] after {seconds:.0f} s, log {run.log}", highlight=False)
        console.print(f"    {run.error}", highlight=False, markup=False)
    else:
        console.print(f"{run.name}: FD {number_text(run.result['final']['fd'])} in {seconds:.0f} s", highlight=False)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith("error:")]
    return (complaints or lines or ["nothing was printed"])[-1]


def _stop(children: Sequence[_Child]) -> None:
    """End the process groups: SIGTERM, and SIGKILL after `GRACE` seconds or at a second Ctrl-C."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    try:
        while any(_alive(child) for child in children) and time.monotonic() < deadline:
            time.sleep(POLL)
    finally:
        for child in children:
            while _alive(child):
                _signal_group(child, signal.SIGKILL)
                time.sleep(POLL / 10)


def _alive(child: _Child) -> bool:
    """Whether any process of the group still runs; the dead that nobody waits for do not count."""
    child.process.poll()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = status.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it ended while we looked
            continue
        if int(group) == child.process.pid and state not in "ZX":
            return True
    return False


def _signal_group(child: _Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C: the children are ended on the way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
