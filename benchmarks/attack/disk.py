"""A small disk of its own for a run directory: a tmpfs, where this process may mount one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

UNSHARED = "PALIMPSEST_CHAOS_UNSHARED"


def may_mount() -> bool:
    """Whether this process has the right to mount a tmpfs."""
    with tempfile.TemporaryDirectory() as directory:
        mounted = mount(Path(directory), 1 << 20)
        unmount(Path(directory))
    return mounted


def unshare() -> None:
    """Start this program anew in a mount namespace of its own, where that gives the right; otherwise do nothing."""
    if not may_mount() and not os.environ.get(UNSHARED) and _run(["unshare", "-rm", "true"]):
        os.environ[UNSHARED] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])


def mount(directory: Path, size: int) -> bool:
    """Put an empty file system of `size` bytes in the place of a directory; whether that was allowed."""
    return _run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)])


def unmount(directory: Path) -> None:
    """Take the file system away again, where there is one."""
    while directory.is_mount() and (_run(["umount", str(directory)]) or _run(["umount", "-l", str(directory)])):
        pass


def clear(directory: Path) -> None:
    """Remove a directory with what was left of it by an earlier benchmark, that was killed."""
    unmount(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _run(command: list[str]) -> bool:
    try:
        return (
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0
        )
    except OSError:
        return False
