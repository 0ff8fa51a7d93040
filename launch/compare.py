"""Train several methods and seeds and set them side by side.

python launch/compare.py --config digits.yaml --methods finetune,generative_replay,generative_distillation --seeds 0,1,2
"""

from __future__ import annotations

import sys

from rich.console import Console

from trainer.cli import run_main
from trainer.compare import parse_comparison, run_all
from trainer.compare_report import remarks, rich_tables, write_report

LOG_WIDTH = 110  # characters, where there is no terminal


def main(argv: list[str]) -> int:
    """Exit code 1 if a run failed."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    comparison = parse_comparison(argv)
    runs = run_all(comparison, console)
    for table in rich_tables(comparison, runs):
        console.print(table)
    for path in write_report(comparison, runs):
        console.print(str(path), highlight=False, soft_wrap=True)
    for remark in remarks(runs):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    return 1 if any(run.result is None for run in runs) else 0


if __name__ == "__main__":
    run_main(main)
