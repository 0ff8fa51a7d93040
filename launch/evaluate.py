"""Measure the model of a finished task again, by other settings.

python launch/evaluate.py --run runs/first [--task 2] [evaluation.samples=10000 ...]
python launch/evaluate.py --run runs/first --report
"""

from __future__ import annotations

import json
from pathlib import Path

from trainer.cli import Parser, positive, run_main
from trainer.errors import UserError
from trainer.run import RunDir


def main(argv: list[str]) -> int:
    """Print the measures as JSON; or with --report, where the report lies."""
    parser = Parser(description="Measure the model of a finished task again.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--task", type=positive, default=0, help="the model after this task; default: the newest")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    parser.add_argument("--report", action="store_true", help="measure nothing; draw the report of the run again")
    parser.add_argument("overrides", nargs="*", metavar="evaluation.key=value", help="over the run's own settings")
    options = parser.parse_intermixed_args(argv)

    if options.report:
        if options.task or options.device or options.overrides:
            raise UserError("--report: draws what the run has measured; it takes neither --task nor settings")
        from trainer.report.page import write_report  # matplotlib

        print(write_report(RunDir(options.run)).index)
        return 0

    from trainer.reevaluation import reevaluate  # torch and diffusers: seconds
    from trainer.sampling import choose_device

    print(json.dumps(reevaluate(options.run, options.task, options.overrides, choose_device(options.device)), indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
