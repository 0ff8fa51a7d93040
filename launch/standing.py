"""Print how far the run of a configuration has come, for scripts that decide whether to start it again.

    python launch/standing.py --config digits.yaml [section.key=value ...]

One line, three fields between tabs: the run directory, `finished` or `unfinished`, and words that are others once a
start has left something that the next one need not do again.
"""

from __future__ import annotations

from pathlib import Path

from trainer.cli import config_parser, run_main
from trainer.run import RunDir
from trainer.settings import load_config
from trainer.standing import standing


def main(argv: list[str]) -> int:
    """Look, and print."""
    options = config_parser("Print how far a run has come.").parse_intermixed_args(argv)
    config = load_config(options.config, options.overrides)
    run = RunDir(Path(config.run.dir) / config.run.name)
    now = standing(config, run)
    print(run.root, "finished" if now.finished else "unfinished", now, sep="\t")
    return 0


if __name__ == "__main__":
    run_main(main)
