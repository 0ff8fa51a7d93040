"""Claims and how they are measured: one row of a benchmark's result, times taken side by side, and where it ran.

    python benchmarks/claims.py --table [--check]

rewrites the tables of benchmarks/README.md, docs/replay.md and docs/results.md from benchmarks/results/*.json, or says
whether they are up to date.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from rich.console import Console
from rich.table import Column, Table

PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "numpy")
NEEDS_CUDA = "needs CUDA"
SIGNS = {"at least": "≥", "at most": "≤"}
BROKEN, WRONG = 1, 2  # exit codes: a claim does not hold; a result is wrong, nothing was timed
README = Path(__file__).resolve().parent / "README.md"


class WrongResult(Exception):
    """What is to be timed does not compute what it should; the message is one line."""


@dataclass(frozen=True)
class Claim:
    """A quantity and its bar. `ours` and `peer` are repeats of a measurement in `unit`, taken side by side.

    The bar is on the ratio of their medians, or, without a peer, on the median of `ours`.
    """

    claim: str
    unit: str
    bar: float
    ours: Sequence[float]
    peer: Sequence[float] = ()
    bound: Literal["at least", "at most"] = "at least"
    needs_cuda: bool = True
    against: str = ""  # who the peer is
    missing: str = ""  # why there is no measurement

    @property
    def ratio(self) -> float | None:
        """What the bar is on; None where something was not measured."""
        if not self.ours or (self.against and not self.peer):
            return None
        return statistics.median(self.ours) / (statistics.median(self.peer) if self.peer else 1.0)

    def holds(self, cuda: bool) -> bool | None:
        """Whether the bar is reached; None where that cannot be said here."""
        if self.ratio is None or (self.needs_cuda and not cuda):
            return None
        return self.ratio >= self.bar if self.bound == "at least" else self.ratio <= self.bar

    def row(self, command: str, hardware: str, versions: Mapping[str, str], cuda: bool) -> dict[str, Any]:
        """As it stands in a result file."""
        holds = self.holds(cuda)
        row: dict[str, Any] = {
            "claim": self.claim,
            "ours": _median(self.ours),
            "peer": _median(self.peer),
            "against": self.against,
            "unit": self.unit,
            "ratio": None if self.ratio is None else _short(self.ratio),
            "bound": self.bound,
            "bar": self.bar,
            "holds": holds,
            "hardware": hardware,
            "command": command,
            "versions": dict(versions),
            "spread": {"ours": quartiles(self.ours), "peer": quartiles(self.peer)},
        }
        if holds is None:
            row["why_not"] = self.missing or ("not measured" if self.ratio is None else NEEDS_CUDA)
        return row


@dataclass
class Report:
    """The result of one benchmark, written whole after each part, so that nothing is lost."""

    command: str
    path: Path | None
    cuda: bool
    hardware: str = field(default_factory=lambda: hardware())
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    def add(self, *claims: Claim) -> None:
        self.rows += [claim.row(self.command, self.hardware, self.versions, self.cuda) for claim in claims]

    def write(self) -> None:
        """To the file of `--json`, in one go; nothing without it."""
        if self.path is None:
            return
        content = {"command": self.command, "hardware": self.hardware, "versions": self.versions, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_name(f".{self.path.name}.tmp")
        half.write_text(json.dumps({**content, **self.details}, indent=1) + "\n")
        half.replace(self.path)

    def conclude(self) -> int:
        """Write, print the table, and say how the process is to end."""
        self.write()
        print_rows(self.rows, self.hardware)
        return BROKEN if any(row["holds"] is False for row in self.rows) else 0


def print_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A short table of claims."""
    table = Table(Column("claim", min_width=44), "ours", "peer", "unit", "ratio", "bar", "holds", title=title)
    for row in rows:
        holds = {True: "yes", False: "NO", None: row.get("why_not", "")}[row["holds"]]
        bar = f"{SIGNS.get(row.get('bound', ''), '')} {row['bar']:g}".strip()
        numbers = (number_text(row[key]) for key in ("ours", "peer"))
        against = f", against {row['against']}" if row.get("against") else ""
        table.add_row(row["claim"] + against, *numbers, row["unit"], number_text(row["ratio"]), bar, holds)
    console = Console()
    (console if console.is_terminal else Console(width=132)).print(table)


def number_text(value: float | None) -> str:
    """Four digits, with thousands grouped; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile; [] of nothing, the value itself twice of one."""
    if len(values) < 2:
        return [_short(value) for value in values] * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [_short(first), _short(third)]


@dataclass
class Timing:
    """Seconds of one call: the first, in which compilers work, and each later round's mean over its calls."""

    first: float
    rounds: list[float] = field(default_factory=list[float])


def side_by_side(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, calls: int, warmup: int = 3
) -> dict[str, Timing]:
    """Times in interleaved rounds (A B A B ...), so that a change of the machine's speed meets all alike."""
    result = {name: Timing(_seconds(call, device, 1)) for name, call in contenders.items()}
    for name in result:
        _seconds(contenders[name], device, warmup)
    for number in range(rounds):
        names = list(result)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            result[name].rounds.append(_seconds(contenders[name], device, calls) / calls)
    return result


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware() -> str:
    """GPU and driver where there is one, CPU and cores."""
    cpu = f"{len(os.sched_getaffinity(0))} cores of {_cpu_model()}"
    if not torch.cuda.is_available():
        return f"{cpu}, no GPU"
    return f"{torch.cuda.get_device_name()}, driver {_driver()}, {cpu}"


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python, and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = torch.__version__ if name == "torch" else version(name)
    return found


def command_line(script: str, arguments: Sequence[str]) -> str:
    """As a person would type it."""
    return " ".join(["python", f"benchmarks/{script}", *arguments])


def fail(error: WrongResult) -> NoReturn:
    """End with one line."""
    print(f"wrong result: {error}", file=sys.stderr)
    sys.exit(WRONG)


def _seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of all calls together, by the device's own clock where it has one."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1e3
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - began


def _median(values: Sequence[float]) -> float | None:
    return _short(statistics.median(values)) if values else None


def _short(value: float) -> float:
    """Six significant digits."""
    return value if not math.isfinite(value) or value == 0 else float(f"{value:.6g}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main(argv: Sequence[str]) -> int:
    """Rewrite or check the tables."""
    from catalogue import table, with_table
    from field import document as results_page
    from quality import document as replay_page

    parser = ArgumentParser(description="The tables of benchmarks/README.md, docs/replay.md and docs/results.md.")
    parser.add_argument("--table", action="store_true", required=True, help="write them from benchmarks/results/*.json")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where it is out of date")
    options = parser.parse_args(argv)
    results = README.parent / "results"
    old = {page: page.read_text() for page in (README, replay_page.PAGE, results_page.PAGE)}
    new = {
        README: with_table(old[README], table(results)),
        replay_page.PAGE: replay_page.with_tables(old[replay_page.PAGE], results),
        results_page.PAGE: results_page.with_tables(old[results_page.PAGE], results),
    }
    if options.check:
        return 0 if new == old else BROKEN
    for page, text in new.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
