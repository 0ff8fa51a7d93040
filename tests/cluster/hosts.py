"""Two hosts on one machine, for tests of what happens between hosts.

Each host has a network, process ids, a host name and mounts of its own (Linux namespaces) and an sshd at its address;
they are joined by a bridge in a third network namespace, so that the machine's own network is left alone. A host has
its own process ids because DeepSpeed's launcher ends a job by `pkill` over ssh: it must find that host's processes
alone. All files are shared. Several pairs can be up at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

HOSTS = ("node1", "node2")
ADDRESSES = {"node1": "10.77.0.11", "node2": "10.77.0.12"}
TOOLS = ("ip", "setpriv", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
SBIN = "/usr/sbin:/sbin"
UP_SECONDS = 120.0  # on a busy machine


class TwoHosts:
    """`node1` and `node2`; `close` ends all that runs on them."""

    def __init__(self, directory: Path) -> None:
        """Bring both up, with keys and logs in `directory`. Needs root; raises RuntimeError where it fails."""
        self.directory = directory.resolve()
        self._tag = f"pal{os.getpid()}x{id(self) % 9973}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.close)
            self._keys()
            self._run("ip", "netns", "add", self._switch)
            self._run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            self._run("ip", "-n", self._switch, "link", "set", "br0", "up")
            for host in HOSTS:
                self._network(host)
                self._start(host)
            self._wait()
            unfinished.pop_all()

    def command(self, host: str, words: str) -> list[str]:
        """What runs a shell command on a host, over ssh from that same host."""
        return ["ip", "netns", "exec", self._netns(host), "ssh", "-F", str(self._home(host) / "config"), host, words]

    def start(self, host: str, words: str, log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a shell command on a host; what it prints goes to `log`."""
        place = f"cd {shlex.quote(str(cwd))} && " if cwd is not None else ""
        with log.open("wb") as out:
            return subprocess.Popen(self.command(host, place + words), stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def run(self, host: str, words: str, timeout: float = 60.0) -> str:
        """What a shell command prints on a host. Raises CalledProcessError, TimeoutExpired."""
        done = subprocess.run(self.command(host, words), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done.stdout.decode()

    def processes(self, host: str, word: str) -> list[int]:
        """The process ids, of that host, whose command lines hold `word`; not those of ssh and of shells."""
        answer = self.run(host, "ps -e -o pid= -o args=", timeout=20)
        rows = [line.split(None, 1) for line in answer.splitlines()]
        named = [row for row in rows if len(row) == 2 and word in row[1]]
        return [int(row[0]) for row in named if not row[1].startswith(("sh", "bash"))]

    def running(self, host: str) -> dict[int, str]:
        """Command lines of all processes on a host, by their ids on the machine: to look at and to signal from here."""
        first = _children(self._running[host].pid) if host in self._running else []
        space = _pid_space(first[0]) if first else None
        found: dict[int, str] = {}
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if space is not None and _pid_space(pid) == space:
                with contextlib.suppress(OSError):
                    found[pid] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def is_up(self, host: str) -> bool:
        """Whether it was not killed, or was revived."""
        return host in self._running

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        self._run("ip", "-n", self._switch, "link", "set", f"ve-{host}", "down")

    def mend(self, host: str) -> None:
        """Put it back."""
        self._run("ip", "-n", self._switch, "link", "set", f"ve-{host}", "up")

    def kill_host(self, host: str) -> None:
        """Everything on the host ends at once, as when its power goes; its network goes too."""
        self.cut(host)
        process = self._running.pop(host)
        # The first process of a PID namespace takes all others of it along.
        for child in _children(process.pid):
            _kill(child, signal.SIGKILL)
        process.kill()
        process.wait(10)

    def revive(self, host: str) -> None:
        """Bring a host that was killed up again."""
        self.mend(host)
        self._start(host)
        self._wait()

    def close(self) -> None:
        """End both hosts and all that runs on them, and take their networks away."""
        for host in HOSTS:
            if host in self._running:
                with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                    self.kill_host(host)
            self._run("ip", "netns", "del", self._netns(host), check=False)
            shutil.rmtree(Path("/etc/netns") / self._netns(host), ignore_errors=True)
        self._run("ip", "netns", "del", self._switch, check=False)

    @property
    def _switch(self) -> str:
        return f"{self._tag}-switch"

    def _netns(self, host: str) -> str:
        return f"{self._tag}-{host}"

    def _home(self, host: str) -> Path:
        return self.directory / host

    def _keys(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("id", "hostkey"):
            if not (self.directory / key).exists():
                self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / key))
        shutil.copy(self.directory / "id.pub", self.directory / "authorized_keys")

    def _network(self, host: str) -> None:
        netns, address = self._netns(host), ADDRESSES[host]
        self._run("ip", "netns", "add", netns)
        cable = ("link", "add", f"ve-{host}", "netns", self._switch, "type", "veth", "peer", "name", "eth0")
        self._run("ip", *cable, "netns", netns)
        self._run("ip", "-n", self._switch, "link", "set", f"ve-{host}", "master", "br0", "up")
        self._run("ip", "-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            self._run("ip", "-n", netns, "link", "set", link, "up")
        names = Path("/etc/netns") / netns
        names.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{ADDRESSES[name]} {name}" for name in HOSTS)]
        (names / "hosts").write_text("\n".join(lines) + "\n")

    def _start(self, host: str) -> None:
        home = self._home(host)
        home.mkdir(mode=0o700, exist_ok=True)
        server = {
            "ListenAddress": f"{ADDRESSES[host]}:22",
            "HostKey": self.directory / "hostkey",
            "PidFile": "none",
            "AuthorizedKeysFile": self.directory / "authorized_keys",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "StrictModes": "no",
            "UsePAM": "no",
            "MaxStartups": "100",
        }
        (home / "sshd.conf").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        client = {
            "IdentityFile": self.directory / "id",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
        }
        lines = [f"Host {' '.join(HOSTS)} 10.77.0.*", *(f"  {key} {value}" for key, value in client.items())]
        (home / "config").write_text("\n".join(lines) + "\n")
        (home / "config").chmod(0o600)
        # Only ~/.ssh is this host's own: the Python installation may lie in the home directory.
        ssh = Path.home() / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        script = (
            f"hostname {host}; mount --bind {shlex.quote(str(home))} {shlex.quote(str(ssh))}; "
            f"exec {_tool('sshd')} -D -e -f {shlex.quote(str(home / 'sshd.conf'))}"
        )
        own = ("--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc")
        tied = ("setpriv", "--pdeathsig", "KILL")  # a test that is killed leaves no host
        with (self.directory / f"sshd-{host}.log").open("wb") as log:
            self._running[host] = subprocess.Popen(
                [*tied, "ip", "netns", "exec", self._netns(host), "unshare", *own, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self) -> None:
        for host in HOSTS:
            end = time.monotonic() + UP_SECONDS
            while True:
                with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                    if self.run(host, "hostname", timeout=30).strip() == host:
                        break
                if time.monotonic() > end:
                    log = (self.directory / f"sshd-{host}.log").read_text(errors="replace")
                    raise RuntimeError(f"{host} did not come up: {log[-500:]}")
                time.sleep(0.1)

    @staticmethod
    def _run(*words: str, check: bool = True) -> None:
        done = subprocess.run([_tool(words[0]), *words[1:]], stdin=subprocess.DEVNULL, capture_output=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")


@contextlib.contextmanager
def two_hosts(directory: Path) -> Generator[TwoHosts, None, None]:
    """Two hosts for the length of a block."""
    hosts = TwoHosts(directory)
    try:
        yield hosts
    finally:
        hosts.close()


def lacking() -> str | None:
    """Why two hosts cannot be made on this machine, in a line; None where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [tool for tool in TOOLS if _tool(tool) == tool and shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: openssh-server, pdsh, iproute2, util-linux)"
    name = f"pal{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, env={**os.environ, "PATH": _path()})
    subprocess.run(["ip", "netns", "del", name], capture_output=True, env={**os.environ, "PATH": _path()})
    return None if made.returncode == 0 else "may not make network namespaces here"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"


def _tool(name: str) -> str:
    return shutil.which(name, path=_path()) or name


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _pid_space(pid: int) -> str | None:
    """The namespace of process ids that a process is in; None for one that is gone."""
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return None


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
