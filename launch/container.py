"""The first process of a container: `python launch/container.py [--run runs/first] deepspeed launch/train.py ...`.

Passes SIGTERM, SIGINT and SIGUSR1 on to the ranks and waits until all have saved. With --run (or $PALIMPSEST_RUN) it
ends with 0 only where the run is finished, with 75 where it is to be started again, and with 2 where a person must mend
something.
"""

from __future__ import annotations

import os
from argparse import REMAINDER
from pathlib import Path

from trainer.cli import Parser, run_main
from trainer.container import run_to_end
from trainer.errors import UserError


def main(arguments: list[str]) -> int:
    """The container's exit code."""
    parser = Parser(description="Run a command as the first process of a container.", allow_abbrev=False)
    parser.add_argument(
        "--run", metavar="DIR", default=os.environ.get("PALIMPSEST_RUN", ""), help="the run directory to judge by"
    )
    parser.add_argument("command", nargs=REMAINDER, metavar="COMMAND", help="and its arguments")
    options = parser.parse_args(arguments)
    if not options.command:
        raise UserError("container.py: which command? e.g. deepspeed launch/train.py --config digits.yaml")
    return run_to_end(options.command, Path(options.run) if options.run else None)


if __name__ == "__main__":
    run_main(main)
