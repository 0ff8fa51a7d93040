"""What DeepSpeed does by itself when the faults of `test_faults` befall a job: `python -m tests.cluster.bare`.

The same two hosts and faults, a toy in place of the trainer, no setting for ssh; each is watched for WATCHED_SECONDS.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import faults
from .hosts import TwoHosts, lacking, two_hosts
from .jobs import ROOT, Place

WATCHED_SECONDS = 100.0
MEND_SECONDS = 5.0
STEPS = 20  # made before the fault
FAULTS: dict[str, Callable[[Place], None]] = {
    "a worker killed (-9)": faults.kill_worker,
    "a host without power": faults.kill_host,
    "the main host without power": faults.kill_main_host,
    "network cut for good": faults.cut,
    "SIGTERM to deepspeed": faults.terminate,
    "deepspeed, pdsh and ssh killed (-9)": faults.lose_connections,
}


def main() -> None:
    """Print a line for each fault as soon as it is over."""
    reason = lacking()
    if reason is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as directory, two_hosts(Path(directory) / "hosts") as hosts:
        for number, (name, fault) in enumerate(FAULTS.items()):
            place = Place(hosts, Path(directory) / str(number))
            job = place.start(
                f"{faults.DEEPSPEED} --hostfile hostfile1 {ROOT / 'tests/cluster/bare_rank.py'}", "node1", ""
            )
            job.wait_until(lambda place=place: counted(place) >= STEPS)
            print(faults.suffer(place, job, fault, WATCHED_SECONDS).line(name), flush=True)
            place.end()
        mended(hosts, Path(directory) / "mended")


def mended(hosts: TwoHosts, path: Path) -> None:
    """A cut that does not last."""
    place = Place(hosts, path)
    job = place.start(f"{faults.DEEPSPEED} --hostfile hostfile1 {ROOT / 'tests/cluster/bare_rank.py'}", "node1", "")
    job.wait_until(lambda: counted(place) >= STEPS)
    began = time.monotonic()
    hosts.cut("node2")
    time.sleep(MEND_SECONDS)
    hosts.mend("node2")
    stood = counted(place)
    job.wait_until(lambda: counted(place) > stood)
    print(f"{'network cut, mended after 5 s':<36}goes on: next step {time.monotonic() - began:.1f}")
    place.end()


def counted(place: Place) -> int:
    """Steps made so far."""
    path = place.path / "steps"
    text = path.read_text() if path.exists() else ""
    return int(text or 0)


if __name__ == "__main__":
    main()
