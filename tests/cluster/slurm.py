"""Slurm on two hosts: the controller on node1, a node on each.

Everything of it lies in one temporary directory, and everything it starts runs on the hosts: it ends with them.
`slurm.conf` is a cluster's in small: two partitions, the jobs of one of which preempt those of the other, no cgroups.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

from .hosts import ADDRESSES, HOSTS, SBIN, TwoHosts, two_hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
UP_SECONDS = 30.0
CPUS = 4  # that each node says it has, whatever the machine has: enough for two ranks
CLUSTER = {
    "ClusterName": "palimpsest",
    "SlurmctldHost": f"node1({ADDRESSES['node1']})",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "MpiDefault": "none",
    # Without control groups, which need more than root where the machine is itself a container.
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU",
    "ReturnToService": "2",
    "JobRequeue": "1",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "KillWait": "30",  # between SIGTERM and SIGKILL, as by default
    "SchedulerParameters": "sched_interval=5,bf_interval=5",
    "SlurmdParameters": "config_overrides",
}


class Slurm:
    """A cluster that takes jobs; `close` is that of its hosts."""

    def __init__(self, hosts: TwoHosts, directory: Path) -> None:
        """Start it, with settings, state and logs in `directory`. Raises RuntimeError where a node does not come up."""
        self.hosts, self.directory = hosts, directory.resolve()
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state", *(f"spool-{host}" for host in HOSTS)):
            (self.directory / name).mkdir(parents=True, mode=0o755)
        self._write_settings()
        self._start("node1", self._munged(), "munged")
        self._wait_for((self.directory / "munge" / "socket").exists, "munged")
        self._start("node1", f"slurmctld -D -f {self._conf}", "slurmctld")
        for host in HOSTS:
            self._start(host, f"slurmd -D -N {host} -f {self._conf}", f"slurmd-{host}")
        self._wait_for(self._nodes_idle, "slurmctld")

    def run(self, words: str, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """What a command of Slurm's prints, asked on node1. Raises CalledProcessError, TimeoutExpired."""
        place = f"cd {shlex.quote(str(cwd))} && " if cwd is not None else ""
        return self.hosts.run("node1", f"{place}SLURM_CONF={self._conf} {words}", timeout)

    def submit(self, words: str, cwd: Path) -> int:
        """The number of the job that `sbatch <words>` makes, in a directory."""
        return int(self.run(f"sbatch --parsable {words}", cwd).strip())

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run(f"scontrol --oneliner show job {number}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, happened: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        """Look at a job until it is as told; what Slurm then knows of it. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not happened(job := self.job(number)):
            if time.monotonic() > end:
                raise TimeoutError(f"job {number} is {job.get('JobState')} ({job.get('Reason')}) after {seconds} s")
            time.sleep(0.5)
        return job

    @property
    def _conf(self) -> Path:
        return self.directory / "slurm.conf"

    def _munged(self) -> str:
        """One for both hosts: a socket in the file system knows no network."""
        place = self.directory / "munge"
        key = place / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = " ".join(f"--{option}={place / name}" for option, name in files.items())
        return f"munged --foreground --force {options}"

    def _write_settings(self) -> None:
        place = self.directory
        lines = CLUSTER | {
            # A requeued job waits until its old credential has expired, by default for two minutes.
            "AuthInfo": f"socket={place / 'munge' / 'socket'},cred_expire=5",
            "StateSaveLocation": place / "state",
            "SlurmdSpoolDir": place / "spool-%n",
            "SlurmctldPidFile": place / "slurmctld.pid",
            "SlurmdPidFile": place / "slurmd-%n.pid",
            "SlurmctldLogFile": place / "slurmctld.log",
            "SlurmdLogFile": place / "slurmd-%n.log",
            "PlugStackConfig": place / "plugstack.conf",
        }
        nodes = [f"NodeName={host} NodeAddr={ADDRESSES[host]} CPUs={CPUS} RealMemory=4000" for host in HOSTS]
        common = f"Nodes={','.join(HOSTS)} MaxTime=INFINITE State=UP"
        partitions = [
            f"PartitionName=low {common} Default=YES PriorityTier=1",
            f"PartitionName=high {common} PriorityTier=10 PreemptMode=OFF",
        ]
        settings = [f"{name}={value}" for name, value in lines.items()]
        self._conf.write_text("\n".join([*settings, *nodes, *partitions]) + "\n")
        (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (place / "plugstack.conf").write_text("")

    def _start(self, host: str, words: str, log: str) -> None:
        words = f"PATH=$PATH:{SBIN} SLURM_CONF={self._conf} exec {words}"
        self._daemons.append(self.hosts.start(host, words, self.directory / f"{log}.out"))

    def _nodes_idle(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            states = self.run("sinfo --noheader --Node --partition=low --format=%T", timeout=10).split()
            return states == ["idle"] * len(HOSTS)
        return False

    def _wait_for(self, happened: Callable[[], bool], log: str) -> None:
        end = time.monotonic() + UP_SECONDS
        while not happened():
            if time.monotonic() > end:
                said = [
                    path.read_text(errors="replace")[-500:]
                    for path in self.directory.glob(f"{log}*.*")
                    if path.is_file()
                ]
                raise RuntimeError(f"{log}: not up after {UP_SECONDS:.0f} s: {' '.join(said)}")
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(directory: Path) -> Generator[Slurm, None, None]:
    """A cluster for the length of a block."""
    with two_hosts(directory / "hosts") as hosts:
        yield Slurm(hosts, directory / "slurm")


def slurm_lacking() -> str | None:
    """Why there can be no cluster, were there hosts, in a line; None where it can."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None
