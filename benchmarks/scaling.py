"""The cost model of docs/scaling.md against what ranks on this machine do.

    python benchmarks/scaling.py [--json FILE] [--ranks 1,2,4] [--stages 0,1,2,3]

Bytes: what two ranks send in a step under each ZeRO stage, counted at the interface of a network of their own (Linux,
root; left out elsewhere), against the model. Time: steps on 1, 2 and 4 ranks, each with the share of one, against what
the model makes of the step of one rank and of the all-reduces that were timed. Ranks that share a core take turns.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claim, Report, WrongResult, command_line, fail

from trainer.cli import Parser, run_main
from trainer.scaling import Link, communication_seconds, sent_bytes
from trainer.settings import load_config

CONFIG = "digits.yaml"
# ZeRO-3 keeps small parameters whole: this model has large ones.
WIDE = ("model.channels=[64,128]", "train.threads=1", "ema.decay=0")
SECONDS = 900.0  # until a trial counts as hung
BYTES_BAR, TIME_BAR = 0.02, 0.15  # relative error


@dataclass(frozen=True)
class Trial:
    """Ranks of this machine that take steps; `share` real images each."""

    ranks: int
    stage: int
    share: int

    def settings(self) -> list[str]:
        return [*WIDE, f"zero.stage={self.stage}", f"train.global_batch={self.ranks * self.share}"]


def run_trial(trial: Trial, apart: bool) -> dict[str, Any]:
    """What the ranks measured. `apart`: in a network of their own. Raises WrongResult where they fail."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "trial.json"
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(trial.ranks)]
        script = str(Path(__file__).parent / "cluster" / "rank.py")
        words = [*launcher, script, "--out", str(out), "--config", CONFIG, *trial.settings()]
        if apart:
            words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode or not out.exists():
            raise WrongResult(f"{trial}: {(done.stderr or done.stdout).strip()[-300:]}")
        return json.loads(out.read_text())


def may_unshare() -> bool:
    words = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(words, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


def fit_link(rows: Sequence[dict[str, float]], ranks: int) -> Link:
    """Bandwidth and latency of a rank's link, from all-reduces: seconds = log2(N) L + 2 (N-1)/N bytes / B.

    Least squares of the relative error, as sizes differ by millions.
    """
    seconds = np.array([row["seconds"] for row in rows])
    sent = np.array([2 * (ranks - 1) / ranks * row["bytes"] for row in rows])
    columns = np.stack([np.full_like(sent, math.log2(ranks)), sent], 1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    return Link(1 / max(float(per_byte), 1e-15), max(float(latency), 0.0))


def bytes_claim(answer: dict[str, Any], trial: Trial) -> Claim:
    """How far the counted bytes of a rank are from the model's."""
    config = load_config(CONFIG, trial.settings())
    counted = answer["sent_bytes"] / trial.ranks
    expected = sent_bytes(answer["parameters"], config, trial.ranks)
    return Claim(
        claim=f"bytes that a rank sends in a step, ZeRO-{trial.stage}, {trial.ranks} ranks: error of the model",
        unit=f"of {counted:,.0f} bytes counted",
        bar=BYTES_BAR,
        ours=[abs(expected - counted) / counted],
        bound="at most",
        needs_cuda=False,
    )


def time_claim(answer: dict[str, Any], trial: Trial, alone: float, link: Link) -> Claim:
    """How far the measured step is from the model's, by the step of one rank alone."""
    config = load_config(CONFIG, trial.settings())
    crowd = max(1.0, trial.ranks / len(os.sched_getaffinity(0)))  # ranks of one thread that share a core
    expected = alone * crowd + communication_seconds(answer["parameters"], config, link, trial.ranks)
    measured = answer["seconds"]
    told = f"of {1000 * measured:.0f} ms measured, {1000 * expected:.0f} ms predicted"
    return Claim(
        claim=f"seconds of a step, ZeRO-{trial.stage}, {trial.ranks} ranks: error of the model",
        unit=told,
        bar=TIME_BAR,
        ours=[abs(expected - measured) / measured],
        bound="at most",
        needs_cuda=False,
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
    parser = Parser(prog="benchmarks/scaling.py", description="The cost model against what ranks here do.")
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4])
    parser.add_argument("--stages", type=numbers, default=[0, 1, 2, 3], help="of the bytes; times are of ZeRO-2")
    parser.add_argument("--share", type=int, default=32, help="real images of a rank in each step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    report = Report(command_line("scaling.py", argv), options.json, cuda=False)
    try:
        if may_unshare():
            for stage in options.stages:
                trial = Trial(2, stage, 4)
                answer = run_trial(trial, apart=True)
                report.details[f"bytes, ZeRO-{stage}"] = answer
                report.add(bytes_claim(answer, trial))
                report.write()
        answers = {ranks: run_trial(Trial(ranks, 2, options.share), apart=False) for ranks in options.ranks}
    except WrongResult as error:
        fail(error)
    alone = answers[min(answers)]["seconds"]
    for ranks, answer in answers.items():
        report.details[f"time, {ranks} ranks"] = answer
        if ranks > 1:
            link = fit_link(answer["link"], ranks)
            report.details[f"link of {ranks} ranks"] = {"GB/s": link.bytes_per_second / 1e9, "us": link.latency * 1e6}
            report.add(time_claim(answer, Trial(ranks, 2, options.share), alone, link))
    return report.conclude()


if __name__ == "__main__":
    run_main(main)
