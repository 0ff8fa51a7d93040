"""What the benchmarks claim, and the table of benchmarks/README.md: from the result files alone, nothing is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims import SIGNS, number_text

NOT_MEASURED = "needs a GPU: not measured"
HOLDS = {"reached": True, "missed": False, "open": None}  # open: too few seeds to say
HEAD = ("claim", "peer", "bar", "measured", "holds", "where")


@dataclass(frozen=True)
class Promise:
    """A claim that a benchmark's result must hold; what the table says before it was measured."""

    claim: str
    bar: str
    peer: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A script, its result file (without .json), and what it promises; `read` is for results without rows."""

    title: str
    command: str
    result: str
    promises: tuple[Promise, ...] = ()
    read: Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None = None
    unmeasured: str = NOT_MEASURED  # what the table says where there is no result


def read_resume(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds = content["seconds"]
    rows = [
        fact("a job killed half-way ends with the weights of an undisturbed one", content["same_weights"]),
        fact("and with a result of the same shape", content["same_matrix_shape"]),
    ]
    claim, bar = "a job killed half-way and resumed ends sooner than one started anew", "< 1"
    ratio = seconds["resumed"] / seconds["whole"]
    measured = f"{ratio:.3g} ({number_text(seconds['resumed'])} s, {number_text(seconds['whole'])} s)"
    return [*rows, {"claim": claim, "bar": bar, "measured": measured, "holds": ratio < 1}]


def read_chaos(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    faults = sum(content["faults"].values())
    lost = len(content["lost"]) + len(content["tracebacks"])
    measured = f"{faults} faults of {len(content['faults'])} kinds, {content['starts']} starts, {lost} losses"
    return [{"claim": "a run under attack loses nothing", "bar": "no loss", "measured": measured, "holds": lost == 0}]


def read_checkpoint(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    waiting, standstill = content["waiting_standstill"], content["standstill"]
    measured = f"{number_text(standstill)} s, {number_text(waiting)} s where training waits for the write"
    claim = f"training stands still less for a checkpoint of {content['checkpoint_bytes'] / 1e9:.2f} GB"
    return [{"claim": claim, "bar": "less", "measured": measured, "holds": standstill < waiting}]


def read_methods(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The forgetting of each method, the median over the seeds."""
    medians = {row["name"]: row["summary"]["forgetting"]["median"] for row in content["rows"]}
    lowest = medians.pop("finetune")
    return [
        {
            "claim": f"{name} forgets less than finetune (increase of FD, median of {len(content['seeds'])} seeds)",
            "peer": "finetune",
            "bar": "less",
            "measured": f"{number_text(value)} ({number_text(lowest)})",
            "holds": value < lowest,
        }
        for name, value in medians.items()
    ]


def read_replay_quality(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pool by its defaults against in-loop distillation; a bar is reached or missed by the whole of an interval."""
    (row,) = (row for row in content["rows"] if row["variant"] == "default")
    ratio, difference, bars = row["fd_ratio"], row["kld_difference"], content["bars"]
    of = f"{content['data']}, {row['paired_seeds']} paired seeds, 90 % interval"
    peer = "distillation in the loop"
    forwards = row["teacher_forwards_per_point"]
    return [
        {
            "claim": f"FD of distillation from the pool ({of})",
            "peer": peer,
            "bar": f"≤ {bars['fd_ratio']:g}",
            "measured": f"{ratio['mean']:.3f} ({ratio['low']:.3f}..{ratio['high']:.3f})",
            "holds": HOLDS[row["verdict"]["fd"]],
        },
        {
            "claim": f"its KLD, the difference ({of})",
            "peer": peer,
            "bar": f"≤ {bars['kld_difference']:g}",
            "measured": f"{difference['mean']:+.4f} ({difference['low']:+.4f}..{difference['high']:+.4f})",
            "holds": HOLDS[row["verdict"]["kld"]],
        },
        {
            "claim": "teacher forwards for each replay point used",
            "bar": f"≤ {bars['teacher_forwards_per_point']:g}",
            "measured": f"{forwards:.3g} (in the loop: 11)",
            "holds": forwards <= bars["teacher_forwards_per_point"],
        },
    ]


def fact(claim: str, holds: bool) -> dict[str, Any]:
    """A claim without a number."""
    return {"claim": claim, "bar": "equal", "measured": "equal" if holds else "different", "holds": holds}


LOOP = "diffusers' loop, {}, the faster of NCHW and channels_last"
STEP = "training step of the program, replay from the pool mixed in"
SIDECAR = "sidecar's sampler, shards encoded and written"
NOISE = "noise kernel, uint8 -> bf16"
ALONE = "the same model trained in PyTorch alone"
BENCHMARKS = (
    Benchmark(
        "Training step",
        "python benchmarks/train_step.py --parts peers,distillation --json benchmarks/results/train_step.json",
        "train_step",
        (
            Promise(STEP, "≥ 1.25", LOOP.format("compiled")),
            Promise(STEP, "≥ 2", LOOP.format("eager")),
            Promise("share of the card's bf16 product that the training step reaches", "≥ 0.5"),
            Promise("time a training step waits for images and replay", "≤ 0.01"),
            Promise("distillation step from the pool, 64 real and 64 replayed images", "≤ 1.03",
                    "a plain step of 128 real images"),
            Promise("distillation step from the pool", "≤ 1",
                    "the paper's step: the teacher samples 10 DDIM steps in the loop"),
        ),
    ),
    Benchmark(
        "What the engine costs",
        "python benchmarks/train_step.py --parts zero --json benchmarks/results/zero.json",
        "zero",
        (
            Promise("step of the engine, ZeRO-1", "≤ 1.03", ALONE),
            Promise("step of the engine, ZeRO-2", "≤ 1.08", ALONE),
            Promise("step of the engine, ZeRO-3", "≤ 1.25", ALONE),
            Promise("step of the engine, ZeRO-3 eager", "≤ 1.25", ALONE.replace("model", "model, uncompiled,")),
        ),
    ),
    Benchmark(
        "Sampling in the sidecar",
        "python benchmarks/sampler.py --json benchmarks/results/sampler.json",
        "sampler",
        (
            Promise(SIDECAR, "≥ 5000"),
            Promise(SIDECAR, "≥ 1", "diffusers' DDIM loop, compiled"),
            Promise(SIDECAR, "≥ 1", "diffusers' DDIM loop, eager"),
            Promise(SIDECAR, "≥ 0.97", "the same with nothing encoded or written"),
        ),
    ),
    Benchmark(
        "Kernels",
        "python benchmarks/kernels.py --json benchmarks/results/kernels.json",
        "kernels",
        (
            Promise(f"{NOISE}, share of the copy's bandwidth", "≥ 0.75", "a copy on the device"),
            Promise(NOISE, "≥ 12", "eager PyTorch"),
            Promise("every kernel", "≥ 1", "torch.compile"),
        ),
    ),
    Benchmark(
        "Reading",
        "python benchmarks/reader.py --json benchmarks/results/reader.json",
        "reader",
        (Promise("raw, 64x64x3: a core reads (images/s)", "≥ 20000"),),
        unmeasured="not measured",
    ),
    Benchmark(
        "Starting again with compiled code",
        "python benchmarks/compile_restart.py --json benchmarks/results/compile_restart.json",
        "compile_restart",
        (Promise("first step of a restart, compiled code found in the run directory", "5", "a start that compiles"),),
        unmeasured="not measured",
    ),
    Benchmark(
        "Checkpoints",
        "python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json",
        "checkpoint",
        read=read_checkpoint,
    ),
    Benchmark(
        "Resuming",
        "python benchmarks/resume.py --json benchmarks/results/resume.json",
        "resume",
        read=read_resume,
    ),
    Benchmark(
        "A run under attack",
        "python benchmarks/chaos.py --minutes 10 --json benchmarks/results/chaos.json",
        "chaos",
        read=read_chaos,
    ),
    *(
        Benchmark(
            f"Replay from the pool, {data}",
            f"python benchmarks/replay_quality.py --data {data} --json benchmarks/results/replay_quality_{data}.json",
            f"replay_quality_{data}",
            read=read_replay_quality,
        )
        for data in ("digits", "fashion_mnist")
    ),
    Benchmark(
        "Forgetting, on the digits",
        "python launch/compare.py --config digits.yaml "
        "--methods finetune,generative_replay,generative_distillation --seeds 0,1",
        "digits-methods",
        read=read_methods,
    ),
)  # fmt: skip


def table(results: Path) -> str:
    """Markdown: for each benchmark its command and the claims, measured or not."""
    parts = list[str]()
    for benchmark in BENCHMARKS:
        path = results / f"{benchmark.result}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        parts += ["", f"**{benchmark.title}**", "", f"    {content.get('command', benchmark.command)}", ""]
        parts += [line(HEAD), line(["---"] * len(HEAD))]
        parts += [line([row[name] for name in HEAD]) for row in rows_of(benchmark, content)]
    return "\n".join(parts).lstrip("\n") + "\n"


def rows_of(benchmark: Benchmark, content: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the table says of one benchmark: its result's rows, or what it promises."""
    if benchmark.read is not None:
        found = benchmark.read(content) if content else []
        where = str(content.get("hardware") or f"{content.get('cores')} cores, {content.get('machine')}")
        return [{"peer": "", **row, "holds": verdict(row["holds"]), "where": where} for row in found]
    rows = [row_text(row) for row in content.get("rows", []) if "claim" in row]
    return rows or [promise_text(promise, benchmark.unmeasured) for promise in benchmark.promises]


def promise_text(promise: Promise, measured: str) -> dict[str, str]:
    """A claim that nobody has measured yet."""
    known = {"claim": promise.claim, "peer": promise.peer, "bar": promise.bar}
    return known | {"measured": measured, "holds": "", "where": ""}


def row_text(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a result as the table shows it."""
    bar = f"{SIGNS.get(row.get('bound', ''), '')} {row['bar']:g}".strip()
    if row["holds"] is None:
        measured = NOT_MEASURED if "CUDA" in row.get("why_not", "") else row.get("why_not", "not measured")
    elif row["peer"] is None:
        measured = f"{number_text(row['ours'])} {row['unit']}"
    else:
        numbers = f"{number_text(row['ours'])}, {number_text(row['peer'])} {row['unit']}"
        measured = f"{number_text(row['ratio'])} ({numbers})"
    known = {"claim": row["claim"], "peer": row.get("against", ""), "bar": bar, "measured": measured}
    where = "" if row["holds"] is None else str(row["hardware"])
    return known | {"holds": verdict(row["holds"]), "where": where}


def verdict(holds: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[holds]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(text: str, table: str, name: str = "claims") -> str:
    """A page with what stands between the two markers of a table replaced. Raises ValueError where they are missing."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, after = text.index(begin) + len(begin), text.index(end)
    return f"{text[:before]}\n{table}{text[after:]}"
