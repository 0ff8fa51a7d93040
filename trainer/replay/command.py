"""The command line of a sampler; imports what is heavy only once it is bound to its parent."""

from __future__ import annotations

from pathlib import Path

from trainer.cli import Parser, positive
from trainer.errors import UserError
from trainer.replay.child import bind_to_parent


def main(arguments: list[str]) -> int:
    """Serve a run directory. Returns the exit code; raises UserError for what a person can mend."""
    supervised = bind_to_parent()
    parser = Parser(prog="teacher.py", description="Sample replay for a run, beside its trainer.", allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the run directory, as runs/first")
    parser.add_argument("--worker", type=int, default=0, help="which of the samplers this is, from 0")
    parser.add_argument("--workers", type=positive, default=1, help="samplers that share the work")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    if not 0 <= options.worker < options.workers:
        raise UserError(
            f"--worker {options.worker}: must be 0 to {options.workers - 1} with --workers {options.workers}"
        )

    from trainer.replay.sidecar import serve  # torch and diffusers: seconds
    from trainer.run import RunDir

    serve(
        RunDir(options.run),
        options.worker,
        options.workers,
        options.device,
        options.threads,
        supervised=supervised,
    )
    return 0
