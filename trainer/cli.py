"""What all entry points share: argument errors and user errors are one line on stderr, and exit code 2."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from trainer.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(ArgumentParser):
    """An argument parser whose complaints are user errors: one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (--help shows the options)")


def config_parser(description: str) -> Parser:
    """The options of every command that takes a configuration: `--config FILE [section.key=value ...]`."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a path, or a name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the file")
    return parser


def positive(text: str) -> int:
    """An argument type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def run_main(main: Callable[[list[str]], int]) -> NoReturn:
    """Run an entry point with the command line's arguments and exit with its code.

    A `UserError` becomes one line on stderr and exit code 2 without a traceback. Under a launcher only the first
    local rank prints it; all ranks exit alike.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = USER_ERROR
        _complain(f"error: {error}")
    except KeyboardInterrupt:
        code = INTERRUPTED
        _complain("interrupted")
    sys.exit(code)


def _complain(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(" ".join(text.split()), file=sys.stderr, flush=True)
