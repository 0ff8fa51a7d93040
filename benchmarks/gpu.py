"""All speed benchmarks on a GPU machine, one after the other, with a result file of each and a log.

    python benchmarks/gpu.py --out DIR [--minutes 9.5] [kernels train_step zero sampler reader compile_restart]

Each has a time limit of its own; where one fails the next ones run all the same. Exit code 0 only when all ended well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
# What the program and its peers import, beside torch's own.
MODULES = (
    *("torch", "triton", "torchvision", "deepspeed", "diffusers", "transformers", "omegaconf", "safetensors"),
    *("numpy", "scipy", "PIL", "rich", "hjson", "cpuinfo", "msgpack", "einops", "psutil", "tqdm", "yaml"),
    *("pydantic", "requests", "webdataset", "matplotlib"),
)
ENDED_WELL = "ended well"
ENDINGS = {0: ENDED_WELL, 1: "a claim does not hold, or a part failed", 2: "wrong result, or wrong arguments"}
SPARE = 45.0  # seconds that a script with --minutes has to start and to end
LAST_LINES = 6  # of a job that did not end well


@dataclass(frozen=True)
class Job:
    """A script with its arguments and its limit in seconds; `paced`: it takes --minutes."""

    script: str
    arguments: tuple[str, ...]
    seconds: float
    paced: bool = True


JOBS = {
    "kernels": Job("kernels.py", (), 240, paced=False),
    "train_step": Job("train_step.py", ("--parts", "peers,distillation"), 560),
    "zero": Job("train_step.py", ("--parts", "zero"), 500),
    "sampler": Job("sampler.py", (), 360),
    "reader": Job("reader.py", (), 240, paced=False),
    "compile_restart": Job("compile_restart.py", (), 300, paced=False),
}


def missing_modules() -> list[str]:
    """Of those that the benchmarks import, by name."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def command(name: str, job: Job, out: Path, seconds: float, extra: Sequence[str] = ()) -> list[str]:
    """The arguments of a job's process."""
    pace = ["--minutes", f"{max(0.0, seconds - SPARE) / 60:.2f}"] if job.paced else []
    result = ["--json", str(out / f"{name}.json")]
    return [sys.executable, str(BENCHMARKS / job.script), *job.arguments, *pace, *result, *extra]


def environment() -> dict[str, str]:
    """The project can be imported, and what was compiled is found again by the next job."""
    cache = Path(tempfile.gettempdir()) / "palimpsest-compiled"
    paths = [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache), **os.environ, **own}


def run(name: str, out: Path, seconds: float, extra: Sequence[str] = ()) -> str:
    """Run a job for at most `seconds`; how it ended, in a word or two. Its output is added to `<out>/log.txt`."""
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n--- {name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command(name, JOBS[name], out, seconds, extra), stdout=log, stderr=subprocess.STDOUT, env=environment()
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # the contenders die with it
            process.wait()
            return f"killed after {seconds:.0f} s"
    return ENDINGS.get(code, f"code {code}")


def summary(name: str, ending: str, out: Path) -> list[str]:
    """A line for each claim of a job, and the end of the log where it did not end well."""
    lines, path = [f"--- {name}: {ending}"], out / f"{name}.json"
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        if "claim" in row:
            holds = {True: "yes", False: "NO ", None: "?  "}[row["holds"]]
            text = f"{row['claim']} / {row.get('against', '')}"
            lines.append(f"{holds} {row['ratio']!s:>9} {row.get('bound', 'bar')} {row['bar']}  {text[:120]}")
    if ending != ENDED_WELL and (out / "log.txt").exists():
        log = (out / "log.txt").read_text(errors="replace").partition(f"\n--- {name}\n")[2].partition("\n--- ")[0]
        lines += [f"  {line[:200]}" for line in log.splitlines()[-LAST_LINES:]]
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the jobs that are named, by default all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and logs go")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all together")
    parser.add_argument("--quick", action="store_true", help="pass --quick to each")
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)}; all without any")
    options = parser.parse_args(argv)
    unknown = set(options.jobs) - JOBS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(JOBS)}")
    missing = missing_modules()
    if missing:
        print(f"not installed: {', '.join(missing)}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    end, ended = time.monotonic() + 60 * options.minutes, dict[str, str]()
    for name in options.jobs or JOBS:
        left, began = end - time.monotonic(), time.monotonic()
        if left < 2 * SPARE:
            ended[name] = "no time was left"
        else:
            ended[name] = run(name, options.out, min(left, JOBS[name].seconds), ["--quick"] if options.quick else [])
        print(f"{name}: {ended[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    for name, ending in ended.items():
        print(*summary(name, ending, options.out), sep="\n")
    return 0 if set(ended.values()) == {ENDED_WELL} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
