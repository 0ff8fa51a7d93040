"""Command lines: of the sampler, and of `launch/teacher.py`, which supervises one. Imports what is heavy only once the
sampler is bound to its parent."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import NoReturn

from trainer.cli import USER_ERROR, Parser, positive
from trainer.compile_cache import use_compile_cache
from trainer.config import ReplayConfig
from trainer.errors import UserError
from trainer.replay.child import bind_to_parent, imports_are_progress, signs_of_life
from trainer.replay.lock import refuse, worker_lock
from trainer.replay.supervisor import Supervisor
from trainer.replay.told import Told
from trainer.run import RunDir

POLL_SECONDS = 0.2
GIVEN_UP = 1


def main(arguments: list[str]) -> int:
    """Keep a sampler going beside a run until the run is finished, or SIGTERM or SIGINT comes.

    Returns:
        The exit code: 1 where the sampler died too often.

    Raises:
        UserError: what a person can mend, here or in the sampler.
    """
    parser, defaults = _parser("teacher.py"), ReplayConfig()
    parser.add_argument("--restarts", type=_count, default=defaults.restarts, help="in a row without a new shard")
    parser.add_argument(
        "--hang-timeout",
        type=_seconds,
        default=defaults.hang_timeout,
        help="seconds without a sign of life after which the sampler is started again",
    )
    options = _parse(parser, arguments)
    run, told = RunDir(options.run), Told()
    signal.signal(signal.SIGTERM, told.set)
    signal.signal(signal.SIGINT, told.set)
    lock = run.sampler_lock(options.worker)
    with worker_lock(lock, refuse(lock, options.worker, told)) as free:
        if not free:
            return 0
    return _supervise(run, options, told)


def _supervise(run: RunDir, options: Namespace, told: Told) -> int:
    supervisor = Supervisor(
        run,
        worker=options.worker,
        workers=options.workers,
        device=options.device,
        threads=options.threads,
        restarts=options.restarts,
        hang_timeout=options.hang_timeout,
        log=run.hand_log(options.worker),
        by_hand=True,
        inherit_devices=True,
    )
    supervisor.start()
    while supervisor.at_work and not told.wait(POLL_SECONDS):
        pass
    supervisor.stop()
    if supervisor.given_up and supervisor.code == USER_ERROR:
        raise UserError(supervisor.given_up)
    if supervisor.given_up:
        print(f"error: {supervisor.given_up}", file=sys.stderr, flush=True)
        return GIVEN_UP
    return 0


def sampler_main(arguments: list[str]) -> NoReturn:
    """Serve a run directory, then end the process. Raises UserError for what a person can mend."""
    bind_to_parent()
    alive = signs_of_life()
    parser = _parser("python -m trainer.replay")
    parser.add_argument(
        "--by-hand",
        action="store_true",
        help="a person started this: end with the run, and do not stand by where the number is taken",
    )
    options = _parse(parser, arguments)
    use_compile_cache(RunDir(options.run), "")

    with imports_are_progress(alive):
        from trainer.replay.sidecar import serve

    serve(
        RunDir(options.run),
        options.worker,
        options.workers,
        options.device,
        options.threads,
        by_hand=options.by_hand,
        alive=alive,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking the interpreter apart takes seconds, for which the trainer's end would wait


def _parser(program: str) -> Parser:
    parser = Parser(prog=program, description="Sample replay for a run, beside its trainer.", allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the run directory, as runs/first")
    parser.add_argument("--worker", type=int, default=0, help="which of the samplers this is, from 0")
    parser.add_argument("--workers", type=positive, default=1, help="samplers that share the work")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    return parser


def _parse(parser: Parser, arguments: list[str]) -> Namespace:
    options = parser.parse_args(arguments)
    if not 0 <= options.worker < options.workers:
        raise UserError(
            f"--worker {options.worker}: must be 0 to {options.workers - 1} with --workers {options.workers}"
        )
    return options


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ArgumentTypeError(f"{text} is not a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds
