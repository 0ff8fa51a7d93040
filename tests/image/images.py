"""Builds and runs the image without a Docker engine and without pulling a base: buildah, podman, debootstrap, as root.

The base and the layers are kept in `build/image-test` (or $PALIMPSEST_IMAGE_CACHE), so that a second build is quick.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("buildah", "podman", "debootstrap", "tar")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
BASE = "localhost/palimpsest-base:bookworm"
FREE_GB = 30  # the environment is there three times while the last stage is made
BUILD_SECONDS = 3600
KEPT = ("index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout", "proxy")
# Of a user that may raise no limits: podman asks for more than such a machine gives.
CONTAINERS_CONF = '[containers]\ndefault_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]\n'


def lacking() -> str | None:
    """Why no image can be built on this machine, in a line; None where it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root, to make a base and to build on it"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: apt install buildah podman debootstrap runc)"
    there = next(path for path in (cache(), *cache().parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    return f"needs {FREE_GB} GB of disk, {free:.0f} are free" if free < FREE_GB and not _has_layers() else None


def cache() -> Path:
    return Path(os.environ.get("PALIMPSEST_IMAGE_CACHE") or ROOT / "build" / "image-test").absolute()


@dataclass(frozen=True)
class Built:
    """An image, how long its building took in seconds, and what that said."""

    tag: str
    seconds: float
    log: str


def build(context: Path, tag: str) -> Built:
    """Build the image of a source tree. Raises AssertionError with the end of the log where that fails."""
    make_base()
    secrets = [f"--secret=id=pip,src={_pip_settings()}"]
    bundle = pip_options().get("cert")
    secrets += [f"--secret=id=ca,src={bundle}"] if bundle else []
    how = [
        "--format=docker",
        "--layers",
        "--force-rm",
        "--isolation=chroot",
        "--network=host",
        f"--build-arg=BASE={BASE}",
        *secrets,
    ]
    began = time.monotonic()
    with (cache() / "build.log").open("w+") as log:
        words = [_tool("buildah"), *_places(), "build", *how, "-t", tag, str(context)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment())
        log.seek(0)
        said = log.read()
    assert done.returncode == 0, said[-4000:]
    return Built(tag, time.monotonic() - began, said)


def make_base() -> None:
    """A minimal Debian as an image, unless it is there already."""
    cache().mkdir(parents=True, exist_ok=True)
    if podman("image", "exists", BASE, check=False).returncode == 0:
        return
    tree = cache() / "base"
    shutil.rmtree(tree, ignore_errors=True)
    with (cache() / "debootstrap.log").open("w") as log:
        words = [_tool("debootstrap"), "--variant=minbase", "bookworm", str(tree)]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), check=True)
    packed = cache() / "base.tar"
    subprocess.run([_tool("tar"), "-C", str(tree), "-cf", str(packed), "."], check=True)
    podman("import", str(packed), BASE)
    packed.unlink()
    shutil.rmtree(tree)


def podman(*words: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run podman; what it prints is in the answer. Raises AssertionError where it fails and `check` is set."""
    runtime = ["--runtime=runc"] if shutil.which("runc", path=_path()) else []
    done = subprocess.run(
        [_tool("podman"), *_places(), *runtime, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=_environment(),
    )
    assert not check or done.returncode == 0, f"podman {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def pip_options() -> dict[str, str]:
    """How pip reaches its registry on this machine: `pip config list`; the environment's word wins."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for line in sorted(said.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        found[name.partition(".")[2]] = str(ast.literal_eval(value))
    return found


def _pip_settings() -> Path:
    """These options as a file for the build, but for files of this machine; the certificates come beside."""
    options = pip_options()
    lines = ["[global]"] + (["cert = /run/secrets/ca"] if "cert" in options else [])
    for name in KEPT:
        values = [value for value in options.get(name, "").split() if not value.startswith(("file:", "/"))]
        lines += [f"{name.removeprefix('default-')} = {' '.join(values)}"] if values else []
    path = cache() / "pip.conf"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")
    return path


def _places() -> list[str]:
    return [f"--root={cache() / 'store'}", f"--runroot={cache() / 'run'}"]


def _environment() -> dict[str, str]:
    settings = cache() / "containers.conf"
    settings.write_text(CONTAINERS_CONF)
    return os.environ | {"PATH": _path(), "CONTAINERS_CONF": str(settings)}


def _has_layers() -> bool:
    return (cache() / "store" / "overlay-images").exists()


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"


def _tool(name: str) -> str:
    return shutil.which(name, path=_path()) or name
