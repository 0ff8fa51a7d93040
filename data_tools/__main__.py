"""Command line: `python -m data_tools build ...`, `python -m data_tools upload ROOT URL`, `python -m data_tools verify
ROOT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_tools.cli import parse, run_build, run_upload, run_verify
from trainer.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for a damaged data set, 2 for what a person can mend."""
    try:
        options = parse(arguments)
        return {"build": run_build, "upload": run_upload, "verify": run_verify}[options.command](options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
