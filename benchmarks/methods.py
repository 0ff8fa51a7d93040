"""The findings of the field on continual diffusion, looked at again: one question, one command.

python benchmarks/methods.py order --data digits --seeds 3 --json FILE [--plot FILE] [section.key=value ...]

Questions: order, rehearsal, timesteps, likelihood, penalty, joint_models (`benchmarks/field/rows.py` says what each
asks). Trains the rows that a question compares, each with each seed, by the program itself, as launch/compare.py does;
measures the final models on many samples; and says for each claim whether it holds, by the 90 % interval over paired
seeds. Runs are shared by the questions: the same command again, or another question, trains only what is missing. Exit
code 1 where a run failed; a claim that does not hold is a finding, not a fault.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from claims import command_line, hardware, package_versions
from field.answers import Answer, answers_of, rows_of
from field.document import answer_cells, head_of, row_cells
from field.outcome import Outcomes, collect
from field.plot import plot
from field.rows import DATA, QUESTIONS, Question, settings_of
from rich.console import Console
from rich.table import Table

from trainer.cli import Parser, positive, run_main
from trainer.compare import Comparison, Row, Run, run_all
from trainer.data.shards import write_atomic
from trainer.errors import UserError

WIDTH = 132  # characters, where there is no terminal


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks/methods.py", description="The findings of the field, looked at again.")
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from 0 on")
    parser.add_argument("--rows", metavar="A,B,...", help="some of the question's rows alone")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the runs; default: runs/methods-DATA")
    parser.add_argument("--jobs", type=positive, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the answer as a picture")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    return parser


def last_words(settings: Sequence[str]) -> list[str]:
    """Each key once, with the value that counts: the last."""
    return list({setting.partition("=")[0]: setting for setting in settings}.values())


def choose(question: Question, names: str | None) -> Question:
    """The question with the rows that are named; raises UserError, naming one that it does not have."""
    if names is None:
        return question
    for name in names.split(","):
        if name not in question.rows:
            raise UserError(f"--rows: {question.name} has no {name}; it has {', '.join(question.rows)}")
    return replace(question, rows=tuple(name for name in question.rows if name in names.split(",")))


def train(question: Question, data: str, seeds: int, out: Path, jobs: int, overrides: Sequence[str]) -> list[Run]:
    """All runs of a question; those that are finished already are not trained again."""
    wanted = Comparison(
        config=DATA[data].config,
        rows=tuple(Row(name, settings_of(name, data)) for name in question.rows),
        seeds=tuple(range(seeds)),
        out=out,
        overrides=(*overrides,),
        jobs=jobs,
    )
    return run_all(wanted, _console())


def show(question: Question, rows: Sequence[dict[str, Any]], answers: Sequence[Answer], title: str) -> None:
    """What was measured, then what it says."""
    measured = Table(*head_of(question.name), title=f"{title}: {question.text}")
    for row in rows:
        measured.add_row(*row_cells(question.name, row))
    said = Table("claim", "measured (90 %)", "holds", title="over paired seeds")
    for answer in answers:
        said.add_row(*answer_cells(answer.as_json()))
    console = _console()
    console.print(measured)
    console.print(said)


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    data, question = DATA[options.data], choose(QUESTIONS[options.question], options.rows)
    overrides = last_words([*data.settings, *options.overrides])
    out = options.out or Path("runs") / f"methods-{options.data}"
    runs = train(question, options.data, options.seeds, out, options.jobs, overrides)
    outcomes: Outcomes = collect(runs, data.samples, options.jobs)
    rows, answers = rows_of(question, outcomes, options.data), answers_of(question, outcomes)
    show(question, rows, answers, f"{options.data}, {data.samples:,} samples")
    content = {
        "command": command_line("methods.py", argv),
        "hardware": hardware(),
        "versions": package_versions(),
        "question": {"name": question.name, "text": question.text, "source": question.source},
        "data": options.data,
        "reduced": data.reduced,
        "settings": overrides,
        "samples": data.samples,
        "rows": rows,
        "answers": [answer.as_json() for answer in answers],
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.plot is not None:
        plot(content, options.plot)
    return 1 if any(run.result is None for run in runs) else 0


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


if __name__ == "__main__":
    run_main(main)
