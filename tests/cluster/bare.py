"""What DeepSpeed does by itself when the faults of `test_faults` befall a job: `python -m tests.cluster.bare`.

Words after it choose those faults in whose names they occur. The same two hosts and faults, a toy in place of the
trainer, no setting for ssh; each is watched for WATCHED_SECONDS.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import faults
from .hosts import lacking, two_hosts
from .jobs import ROOT, Job, Place

WATCHED_SECONDS = 100.0
MEND_SECONDS = 5.0
MENDED = "network cut, mended after 5 s"
STEPS = 20  # made before the fault
FAULTS: dict[str, Callable[[Place], None]] = {
    "a worker killed (-9)": faults.kill_worker,
    "a host without power": faults.kill_host,
    "the main host without power": faults.kill_main_host,
    "network cut for good": faults.cut,
    "SIGTERM to deepspeed": faults.terminate,
    "deepspeed, pdsh and ssh killed (-9)": faults.lose_connections,
}


def main(words: list[str]) -> None:
    """Print a line for each fault as soon as it is over."""
    reason = lacking()
    if reason is not None:
        raise SystemExit(reason)
    chosen = [name for name in (*FAULTS, MENDED) if not words or any(word in name for word in words)]
    with tempfile.TemporaryDirectory() as directory, two_hosts(Path(directory) / "hosts") as hosts:
        for number, name in enumerate(chosen):
            place = Place(hosts, Path(directory) / str(number))
            script = ROOT / "tests" / "cluster" / "bare_rank.py"
            job = place.start(f"{faults.DEEPSPEED} --hostfile hostfile1 {script}", "node1", "")
            job.wait_until(lambda place=place: counted(place) >= STEPS)
            told = (
                mend(place, job)
                if name == MENDED
                else faults.suffer(place, job, FAULTS[name], WATCHED_SECONDS).line(name)
            )
            print(told, flush=True)
            place.end()


def mend(place: Place, job: Job) -> str:
    """A cut that does not last."""
    began = time.monotonic()
    place.hosts.cut("node2")
    time.sleep(MEND_SECONDS)
    stood = counted(place)
    place.hosts.mend("node2")
    job.wait_until(lambda: counted(place) > stood)
    return f"{MENDED:<38}goes on: next step {time.monotonic() - began:.1f}"


def counted(place: Place) -> int:
    """Steps made so far."""
    path = place.path / "steps"
    text = path.read_text() if path.exists() else ""
    return int(text or 0)


if __name__ == "__main__":
    main(sys.argv[1:])
