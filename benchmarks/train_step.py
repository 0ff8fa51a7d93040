"""Training steps side by side: the program, diffusers' loop, DeepSpeed's cost, a step of distillation.

    python benchmarks/train_step.py [--parts peers,zero,distillation] [--minutes 9] [--json FILE] [--quick]

Each contender has a process of its own and they take turns (`speed/turns.py`). Without CUDA the sizes are small, times
are CPU times, and no bar of a GPU is judged. `--ranks 2` times part `zero` over gloo ranks on the CPU.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from claims import BROKEN, Claim, Report, WrongResult, command_line, fail
from speed.card import forward_flops, measure_card
from speed.ours import check_program, engine_training, program_training
from speed.peers import diffusers_training
from speed.plain import plain_training, reference_training
from speed.race import Race
from speed.reference import LOSS_ERROR, NORM_ERROR, STAGE_ERROR, compare
from speed.sampling import make_pools
from speed.sizes import SIZES, Sizes, make_config
from speed.turns import Answer, Entry

EAGER = ("diffusers eager", "diffusers eager channels_last")
COMPILED = ("diffusers compiled", "diffusers compiled channels_last")
PROGRAM = {"program, pool": "pool", "program, plain": "plain", "program, inline": "inline"}
COST = {"zero-1": 1.03, "zero-2": 1.08, "zero-3": 1.25, "zero-3 eager": 1.25}
EAGER_STAGES = ("plain eager", "zero-3 eager")
PARTS = {
    "peers": ("program, pool", *COMPILED, *EAGER),
    "zero": ("plain", "zero-1", "zero-2", "reference", "zero-3", *EAGER_STAGES, "zero-0"),
    "distillation": ("program, pool", "program, plain", "program, inline"),
}


@dataclass(frozen=True)
class Setting:
    """What is run: sizes, and a seed that is another one each time."""

    sizes: Sizes
    directory: Path
    seed: int
    device: str
    ranks: int

    @property
    def clock(self) -> str:
        """The time of a round that counts. CPUs are shared: there it is the CPU's."""
        return "seconds" if self.device == "cuda" else "cpu_seconds"


def roster(setting: Setting) -> dict[str, Entry]:
    """All contenders by name; without a compiler none that is compiled where another is not."""
    common = {"sizes": setting.sizes, "directory": setting.directory, "seed": setting.seed}
    compiles = setting.sizes.compile
    entries = {"make pools": Entry(make_pools, common)}
    for name in (*EAGER, *(COMPILED if compiles else ())):
        how = {"compiled": name in COMPILED, "channels_last": name.endswith("channels_last")}
        entries[name] = Entry(diffusers_training, common | how, eager=name in EAGER)
    for name, mode in PROGRAM.items():
        entries[name] = Entry(program_training, common | {"mode": mode})
    ranks = setting.ranks
    entries["plain"] = Entry(plain_training, common | {"compiled": compiles}, ranks)
    for stage in range(0 if setting.sizes.precision == "fp32" else 1, 4):  # without ZeRO the program takes fp32 alone
        entries[f"zero-{stage}"] = Entry(engine_training, common | {"stage": stage, "compiled": compiles}, ranks)
    if compiles:
        entries["plain eager"] = Entry(plain_training, common | {"compiled": False}, ranks, eager=True)
        entries["zero-3 eager"] = Entry(engine_training, common | {"stage": 3, "compiled": False}, ranks, eager=True)
    if ranks == 1:
        entries["reference"] = Entry(reference_training, common, eager=True)
    return entries


def run_part(part: str, race: Race, setting: Setting, report: Report) -> None:
    """Check, time and profile the contenders of a part; its claims go into the report.

    Raises:
        WrongResult: something computes what it should not.
    """
    sizes = setting.sizes
    names = [name for name in PARTS[part] if name in race.entries]
    if part != "zero" and "make pools" not in race.facts:
        race.enter(["make pools"], 0)
        race.leave(["make pools"])
    here = race.enter(names, sizes.warm)
    report.details[part] = {"first_losses": {name: race.warm[name]["losses"] for name in here}}
    errors = check_zero(race, here, sizes) if part == "zero" else check_losses(race, here, sizes)
    racers = [name for name in here if name != "reference"]
    answers = race.rounds(racers, sizes.rounds, sizes.settle, sizes.steps, sizes.seconds)
    profiles = race.profile([name for name in racers if "diffusers" not in name], sizes.profiled)
    found = {name: summary(race, name, answers[name], profiles.get(name, {}), setting) for name in racers}
    report.details[part] |= {"errors": errors, "contenders": found}
    seconds = {name: step_seconds(answers[name], setting) for name in racers}
    report.add(*CLAIMS[part](seconds, answers, setting, report.details))
    report.write()


def check_losses(race: Race, names: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Errors of the first losses of the program and its peers, each against its reference. Raises WrongResult."""
    facts = {name: race.facts[name] for name in names}
    errors: dict[str, Any] = {name: known["error"] for name, known in facts.items() if "error" in known}
    square = race.facts.get("make pools", {}).get("target_square")
    for name in PROGRAM.keys() & facts.keys():
        errors[name] = check_program(facts[name], square if PROGRAM[name] == "pool" else None, sizes.precision)
    return errors


def check_zero(race: Race, names: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Errors of the first steps' losses and gradient norms: against the reference, and among the stages.

    Raises:
        WrongResult: more than rounding.
    """
    exact, wrong, errors = race.warm.get("reference"), list[str](), dict[str, Any]()
    for name in [name for name in names if name != "reference"]:
        other = EAGER_STAGES[0] if name in EAGER_STAGES else "zero-1"
        try:
            errors[name] = errors_of_steps(name, race.warm[name], exact, race.warm.get(other), sizes.precision)
        except WrongResult as error:
            wrong.append(str(error))
    if wrong:
        raise WrongResult("; ".join(wrong))
    return errors


def errors_of_steps(
    name: str, own: Answer, exact: Answer | None, beside: Answer | None, precision: str
) -> dict[str, float]:
    """Of a contender's first steps, against those of the reference and of another stage. Raises WrongResult."""
    error = dict[str, float]()
    if exact is not None:
        error["loss"] = compare(f"{name}: losses", own["losses"], exact["losses"], LOSS_ERROR[precision])
        norms = own["grad_norms"], exact["grad_norms"]
        error["grad_norm"] = compare(f"{name}: gradient norms", *norms, NORM_ERROR[precision])
    if beside is not None:
        what = f"{name}: losses, beside another stage's"
        error["stages"] = compare(what, own["losses"], beside["losses"], STAGE_ERROR[precision])
    return error


def step_seconds(answers: Sequence[Answer], setting: Setting) -> list[float]:
    """Of a mean step of each round."""
    return [answer[setting.clock] / answer["steps"] for answer in answers]


def summary(race: Race, name: str, answers: Sequence[Answer], profile: Answer, setting: Setting) -> dict[str, Any]:
    """What is known of a contender, for the result file."""
    result: dict[str, Any] = {"first_steps_seconds": race.warm[name]["seconds"], "losses": race.warm[name]["losses"]}
    if answers:
        seconds = step_seconds(answers, setting)
        result["step_ms"] = [value * 1e3 for value in seconds]
        result["images_per_second"] = setting.sizes.batch / statistics.median(seconds)
        result["issued_ms"] = statistics.median(answer["issued"] / answer["steps"] for answer in answers) * 1e3
        result["waited_share"] = statistics.median(answer["waited"] / answer["seconds"] for answer in answers)
        result["peak_gb"] = max(answer["peak_bytes"] for answer in answers) / 1e9
    return result | {key: value for key, value in profile.items() if key != "facts"}


Seconds = Mapping[str, Sequence[float]]


def images_per_second(setting: Setting, seconds: Sequence[float]) -> list[float]:
    return [setting.sizes.batch / value for value in seconds]


def fastest(seconds: Seconds, names: Sequence[str]) -> Sequence[float]:
    """Of the contenders that finished a round; empty where none did."""
    measured = [seconds[name] for name in names if seconds.get(name)]
    return min(measured, key=statistics.median, default=[])


def claims_of_peers(
    seconds: Seconds, answers: Mapping[str, Sequence[Answer]], setting: Setting, details: Mapping[str, Any]
) -> list[Claim]:
    """Point 1 of the speed goals."""
    ours = images_per_second(setting, seconds.get("program, pool", []))
    what = "training step of the program, replay from the pool mixed in"
    loop = "diffusers' loop, {}, the faster of NCHW and channels_last"
    claims = [
        Claim(what, "images/s", 1.25, ours, images_per_second(setting, fastest(seconds, COMPILED)),
              against=loop.format("compiled")),
        Claim(what, "images/s", 2.0, ours, images_per_second(setting, fastest(seconds, EAGER)),
              against=loop.format("eager")),
    ]  # fmt: skip
    card = details.get("card", {}).get("flops_per_second")
    share = [3 * details["forward_flops"] * rate / card for rate in ours] if card else []
    claims.append(Claim("share of the card's bf16 product that the training step reaches", "share", 0.5, share))
    waits = [answer["waited"] / answer["seconds"] for answer in answers.get("program, pool", [])]
    what = "time a training step waits for images and replay"
    return [*claims, Claim(what, "share of the step", 0.01, waits, bound="at most")]


def claims_of_zero(
    seconds: Seconds, answers: Mapping[str, Sequence[Answer]], setting: Setting, details: Mapping[str, Any]
) -> list[Claim]:
    """Point 2."""
    claims: list[Claim] = []
    for name, bar in COST.items():
        peer = seconds.get("plain eager" if name in EAGER_STAGES else "plain", [])
        claims.append(
            Claim(
                f"step of the engine, {name.replace('zero-', 'ZeRO-')}"
                + (f", {setting.ranks} ranks" if setting.ranks > 1 else ""),
                "ms",
                bar,
                [value * 1e3 for value in seconds.get(name, [])],
                [value * 1e3 for value in peer],
                bound="at most",
                against=f"the same model{', uncompiled,' if name in EAGER_STAGES else ''} trained in PyTorch alone",
            )
        )
    return claims


def claims_of_distillation(
    seconds: Seconds, answers: Mapping[str, Sequence[Answer]], setting: Setting, details: Mapping[str, Any]
) -> list[Claim]:
    """Point 3."""
    steps = {name: [value * 1e3 for value in seconds.get(name, [])] for name in PROGRAM}
    half = setting.sizes.batch // 2
    pool, plain, inline = (steps[name] for name in ("program, pool", "program, plain", "program, inline"))
    return [
        Claim(f"distillation step from the pool, {half} real and {half} replayed images", "ms", 1.03, pool, plain,
              bound="at most", against=f"a plain step of {2 * half} real images"),
        Claim("distillation step from the pool", "ms", 1.0, pool, inline,
              bound="at most", against="the paper's step: the teacher samples 10 DDIM steps in the loop"),
    ]  # fmt: skip


CLAIMS = {"peers": claims_of_peers, "zero": claims_of_zero, "distillation": claims_of_distillation}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, by name and in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="what there is no time for is left out and named")
    parser.add_argument("--ranks", type=int, default=1, help="gloo ranks of part zero, on the CPU")
    parser.add_argument("--lanes", type=int, default=2, help="contenders that compile at the same time")
    parser.add_argument("--autotune", action="store_true", help="with train.autotune=true; compiles for minutes")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU: whether everything runs")
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.ranks > 1 and options.parts != ["zero"]:
        parser.error("--ranks: with --parts zero only")
    return options


def main(argv: Sequence[str]) -> int:
    """Run the parts; the exit code."""
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() and not options.quick and options.ranks == 1 else "cpu"
    sizes = SIZES["quick" if options.quick else {"cuda": "gpu", "cpu": "cpu"}[device]]
    precision = options.precision or sizes.precision
    sizes = replace(sizes, autotune=options.autotune and sizes.compile, precision=precision)
    report = Report(command_line("train_step.py", argv), options.json, device == "cuda")
    with tempfile.TemporaryDirectory(prefix="palimpsest-speed-") as directory:
        setting = Setting(sizes, Path(directory), secrets.randbits(31), device, options.ranks)
        report.details |= {"sizes": asdict(sizes), "seed": setting.seed, "clock": setting.clock}
        report.details["forward_flops"] = forward_flops(make_config(sizes, Path(directory), "flops"))
        if device == "cuda":
            report.details["card"] = measure_card()
            torch.cuda.empty_cache()
        wanted = {name for part in options.parts for name in PARTS[part]}
        if options.parts != ["zero"]:
            wanted.add("make pools")
        entries = {name: entry for name, entry in roster(setting).items() if name in wanted}
        wrong = list[str]()
        with Race(entries, device, seconds=60 * options.minutes, lanes=options.lanes) as race:
            for number, part in enumerate(options.parts):
                try:
                    run_part(part, race, setting, report)
                except WrongResult as error:  # the other parts are of use all the same
                    wrong.append(str(error))
                later = {name for other in options.parts[number + 1 :] for name in PARTS[other]}
                race.leave([name for name in entries if name not in later])
    report.details |= {"failed": race.failed, "skipped": race.skipped, "wrong": wrong}
    code = report.conclude()
    for what in (*race.failed.values(), *(f"no time for {what}" for what in race.skipped)):
        print(what)
    if wrong:
        fail(WrongResult("; ".join(wrong)))
    return BROKEN if race.failed else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
