"""The sidecar's sampler beside diffusers' DDIM loop, in network evaluations per second, and what writing shards costs.

    python benchmarks/sampler.py [--minutes 9] [--json FILE] [--quick]

The same teacher, batch and precision everywhere. The sampler runs with replay.compile=true, and on CUDA under CUDA
graphs; without one or both it is timed beside. It takes 10 points from each trajectory of 10 DDIM steps, so
it evaluates the network 20 times an image; diffusers' loop does so 10 times. Each contender has a process of its own
and they take turns (`speed/turns.py`). Without CUDA the sizes are small and times are CPU times.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from claims import BROKEN, Claim, Report, WrongResult, command_line, fail
from speed.card import forward_flops, measure_card
from speed.peers import diffusers_sampling
from speed.race import Race
from speed.sampling import sampling_alone, sidecar
from speed.sizes import SIZES, Sizes, make_config
from speed.turns import Entry

STEPS = 10  # DDIM steps
ROUND_SECONDS = 3.0
SETTLE = 1  # shards of a round before its time is taken
EAGER, COMPILED = "diffusers eager", "diffusers compiled channels_last"
WRITING, ALONE = "sidecar", "sampler, nothing written"
SLOWER = {"sampler, not compiled, nothing written": "graphs", "sampler eager, nothing written": "eager"}


def roster(sizes: Sizes, directory: Path, seed: int) -> dict[str, Entry]:
    """All contenders by name."""
    common = {"sizes": sizes, "directory": directory, "seed": seed}
    entries = {WRITING: Entry(sidecar, common)}
    for name in (COMPILED, EAGER) if sizes.compile else (EAGER,):
        how = {"steps": STEPS, "compiled": name == COMPILED, "channels_last": name == COMPILED}
        entries[name] = Entry(diffusers_sampling, common | how, eager=name == EAGER)
    entries[ALONE] = Entry(sampling_alone, common | {"how": "compiled"})  # after the sidecar, which compiles the same
    for name, how in SLOWER.items():
        entries[name] = Entry(sampling_alone, common | {"how": how}, eager=True)
    return entries


def claims(rates: Mapping[str, Sequence[float]], failed: Mapping[str, str]) -> list[Claim]:
    """Point 4 of the speed goals."""
    ours, alone = rates.get(WRITING, []), rates.get(ALONE, [])
    unit, missing = "evaluations/s", failed.get(WRITING, "")
    what, loop = "sidecar's sampler, shards encoded and written", "diffusers' DDIM loop"
    return [
        Claim(what, unit, 5000, ours, missing=missing),
        Claim(what, unit, 1.0, ours, rates.get(COMPILED, []), against=f"{loop}, compiled", missing=missing),
        Claim(what, unit, 1.0, ours, rates.get(EAGER, []), against=f"{loop}, eager", missing=missing),
        Claim(what, unit, 0.97, ours, alone, against="the same with nothing encoded or written", missing=missing),
    ]


def race(report: Report, sizes: Sizes, directory: Path, minutes: float, device: str) -> Race:
    """Check and time all contenders; what is found goes into the report.

    Raises:
        WrongResult: trajectories that are not DDIM's.
    """
    seed = secrets.randbits(31)
    entries = roster(sizes, directory, seed)
    clock = "seconds" if device == "cuda" else "cpu_seconds"
    with Race(entries, device, seconds=60 * minutes, lanes=2) as race:
        here = race.enter(entries, sizes.warm)
        answers = race.rounds(here, sizes.rounds, SETTLE, sizes.steps, ROUND_SECONDS)
        rates = {
            name: [race.facts[name]["evaluations"] * answer["steps"] / answer[clock] for answer in answers[name]]
            for name in here
        }
        profiles = race.profile([WRITING, ALONE], 1)
    report.details |= {"seed": seed, "clock": clock, "failed": race.failed, "skipped": race.skipped}
    report.details["contenders"] = {
        name: {
            "evaluations_per_second": statistics.median(rates[name]) if rates[name] else None,
            "rounds": rates[name],
            "first_steps_seconds": race.warm[name]["seconds"],
            "error": race.facts[name].get("error"),
            "peak_gb": max((answer["peak_bytes"] for answer in answers[name]), default=0) / 1e9,
            **{key: value for key, value in profiles.get(name, {}).items() if key != "facts"},
        }
        for name in here
    }
    report.add(*claims(rates, race.failed))
    return race


def main(argv: Sequence[str]) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="what there is no time for is left out and named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU: whether everything runs")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not options.quick else "cpu"
    sizes = SIZES["quick" if options.quick else {"cuda": "gpu", "cpu": "cpu"}[device]]
    report = Report(command_line("sampler.py", argv), options.json, device == "cuda")
    with tempfile.TemporaryDirectory(prefix="palimpsest-speed-") as directory:
        flops = forward_flops(make_config(sizes, Path(directory), "flops"))
        report.details |= {"sizes": asdict(sizes), "forward_flops": flops}
        if device == "cuda":
            report.details["card"] = measure_card()
            torch.cuda.empty_cache()
        try:
            ended = race(report, sizes, Path(directory), options.minutes, device)
        except WrongResult as error:
            fail(error)
    code = report.conclude()
    for what in (*ended.failed.values(), *(f"no time for {what}" for what in ended.skipped)):
        print(what)
    return BROKEN if ended.failed else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
