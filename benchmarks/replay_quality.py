"""Does replay from the pool lose anything against sampling in the loop, and what do its settings cost or gain?

python benchmarks/replay_quality.py --data digits --seeds 5 --json FILE [--variants A,B,...] [section.key=value ...]

Trains each variant with each seed by the program itself, as launch/compare.py does, measures the final models on many
samples, and sets each variant beside in-loop distillation with the same seed: so the same first task, real batches and
noise. FD as a ratio and KLD as a difference, with 90 % intervals. The same command again trains only what is missing.
Exit code 1 where a run failed, or the pool by its defaults is shown to lose: 5 % in FD, 0.02 in KLD.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import command_line, hardware, package_versions
from quality.document import row_text
from quality.plot import plot
from quality.result import FD_BAR, FORWARDS_BAR, KLD_BAR, collect, rows_of
from quality.variants import DATA, DEFAULT, INLINE, MAIN, VARIANTS, Variant, variant
from rich.console import Console
from rich.table import Table

from trainer.cli import Parser, positive, run_main
from trainer.compare import Comparison, Row, Run, run_all
from trainer.data.shards import write_atomic
from trainer.errors import UserError

WIDTH = 132  # characters, where there is no terminal


def make_parser() -> Parser:
    parser = Parser(
        prog="benchmarks/replay_quality.py", description="Replay from the pool against sampling in the loop."
    )
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--seeds", type=positive, default=5, help="how many, from 0 on")
    parser.add_argument(
        "--few", type=positive, help=f"how many for variants but {INLINE} and {DEFAULT}; default: as many"
    )
    parser.add_argument(
        "--variants",
        default=",".join(MAIN),
        metavar="A,B,...",
        help=f"of {', '.join(one.name for one in VARIANTS)}; or all",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the runs; default: runs/replay-quality-DATA")
    parser.add_argument("--jobs", type=positive, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="quality against teacher forwards, as a picture")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    return parser


def choose(names: str) -> list[Variant]:
    """Raises UserError, naming one that there is not."""
    if names == "all":
        return list(VARIANTS)
    known = [one.name for one in VARIANTS]
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise UserError(f"--variants: unknown {unknown[0]}; known: {', '.join(known)}")
    return [variant(name) for name in names.split(",")]


def share_seeds(chosen: Sequence[Variant], seeds: int, few: int) -> list[tuple[list[Variant], int]]:
    """The variants that get many seeds, because the bars are about them, and the others, each with their number."""
    main = [one for one in chosen if one.name in (INLINE, DEFAULT)]
    others = [one for one in chosen if one not in main]
    return [(group, count) for group, count in ((main, seeds), (others, few)) if group]


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The main table."""
    heads = (
        "variant",
        "forwards\n/ point",
        "seeds",
        "FD\n(min..max)",
        "FD / inline\n(90 %)",
        "KLD",
        "KLD - inline\n(90 %)",
    )
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row_text(row, ratio="{:.3f}", kld="{:.4f}"))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    data, chosen = DATA[options.data], choose(options.variants)
    overrides = (*data.settings, *options.overrides)
    runs: list[Run] = []
    for group, seeds in share_seeds(chosen, options.seeds, options.few or options.seeds):
        wanted = Comparison(
            config=data.config,
            rows=tuple(Row(one.name, one.settings) for one in group),
            seeds=tuple(range(seeds)),
            out=options.out or Path("runs") / f"replay-quality-{options.data}",
            overrides=overrides,
            jobs=options.jobs,
        )
        runs += run_all(wanted, Console(width=None if sys.stdout.isatty() else WIDTH))
    rows = rows_of(collect(runs, data.samples, options.jobs))
    show(rows, f"{options.data}, {data.samples:,} samples; paired with in-loop distillation seed by seed")
    content = {
        "command": command_line("replay_quality.py", argv),
        "hardware": hardware(),
        "versions": package_versions(),
        "data": options.data,
        "reduced": data.reduced,
        "settings": list(overrides),
        "samples": data.samples,
        "bars": {"fd_ratio": FD_BAR, "kld_difference": KLD_BAR, "teacher_forwards_per_point": FORWARDS_BAR},
        "rows": rows,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.plot is not None:
        plot(rows, options.plot, options.data)
    failed = any(run.result is None for run in runs)
    lost = any("missed" in row["verdict"].values() for row in rows if row["variant"] == DEFAULT and "verdict" in row)
    return 1 if failed or lost else 0


if __name__ == "__main__":
    run_main(main)
