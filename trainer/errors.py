"""Errors that a person can act on."""

import sys
from contextlib import suppress


class UserError(ValueError):
    """Something the person who started the program can mend: one line, naming the file and the key.

    Entry points print it without a traceback and exit with code 2.
    """


class ToldElsewhere(UserError):
    """This rank ends because of an error that another rank tells the person about."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key."""


def disk_error(error: OSError) -> UserError:
    """What the operating system refused, as a person can mend it."""
    return UserError(f"{error.filename or 'the run directory'}: {error.strerror or error}; key run.dir")


def say(text: str) -> None:
    """A line for people on stderr, which may lie on a full disk: then it is lost, and nothing else."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def one_line(value: object) -> str:
    """What a message shows of something found in a file: one line, and no long one."""
    text = " ".join(str(value).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
