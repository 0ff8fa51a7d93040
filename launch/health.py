"""Exit code 0 where a run has made progress lately, else 1: `python launch/health.py [--run runs/first] [--worker 0]`.

For the health checks of containers and clusters; without a run directory, any of those in runs/ will do.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainer.cli import Parser, positive, run_main
from trainer.health import judge
from trainer.run import RunDir

WITHIN = 3600  # seconds: an evaluation, in which nothing is written, takes less


def main(arguments: list[str]) -> int:
    """Says why in a line, too."""
    parser = Parser(description="Does a run make progress?", allow_abbrev=False)
    parser.add_argument(
        "--run", metavar="DIR", default=os.environ.get("PALIMPSEST_RUN", ""), help="default: every one in runs/"
    )
    parser.add_argument("--worker", type=int, metavar="N", help="of this sampler, in place of the trainer's")
    parser.add_argument("--within", type=positive, default=WITHIN, help="seconds in which there must be some")
    options = parser.parse_args(arguments)
    runs = [RunDir(Path(options.run))] if options.run else [RunDir(path) for path in Path("runs").glob("*")]
    health = judge(runs, options.worker, options.within)
    print(health.why)
    return 0 if health.good else 1


if __name__ == "__main__":
    run_main(main)
