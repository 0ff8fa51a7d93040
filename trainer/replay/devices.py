"""Which GPU of the node each sampler takes, whatever part of the node its trainer was given to see.

DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES of its ranks to the GPUs of the ranks, and a child inherits it: a sampler
on any other GPU has to be shown that one. Devices are therefore named here as the node numbers them.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
COUNT_SECONDS = 60.0
_COUNT = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
print(0 if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) else count.value)
"""


def parse_device(name: str) -> int | None:
    """The number of the GPU that `replay.device` names: 0 for cuda, N for cuda:N, None for cpu. Raises ConfigError."""
    if name == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if match is None:
        raise ConfigError(f"replay.device={name}: must be cpu, cuda or cuda:N")
    return int(match[1] or 0)


def choose_devices(
    replay_device: str, workers: int, trainers: int, gpus: int, visible: Sequence[int] | None = None
) -> list[str]:
    """The device of each sampler of a node: cpu, or cuda:N for the node's GPU N.

    Args:
        replay_device: what all of them take; when empty, the GPUs after the trainers', round robin, or the trainers'
            own where there are none.
        trainers: trainer ranks of the node, one on each of its first GPUs.
        gpus: of the node; 0 leaves the CPU.
        visible: the GPUs that a trainer was given, all trainers' first; None for all. A choice other than the one
            deepspeed makes for `--num_gpus` is a person's or a scheduler's and is kept to.

    Raises:
        ConfigError: no such device.
    """
    if replay_device:
        index = parse_device(replay_device)
        if index is not None and index >= gpus:
            have = f"has GPUs cuda:0 to cuda:{gpus - 1}" if gpus else "has no CUDA device"
            raise ConfigError(f"replay.device={replay_device}: this machine {have}")
        return ["cpu" if index is None else f"cuda:{index}"] * workers
    given = list(range(gpus)) if visible is None else list(visible)
    if not gpus or not given:
        return ["cpu"] * workers
    free = given[trainers:]
    if given == list(range(trainers)):
        free = list(range(trainers, gpus))
    chosen = free or given
    return [f"cuda:{chosen[worker % len(chosen)]}" for worker in range(workers)]


def visible_gpus(environ: Mapping[str, str]) -> list[int] | None:
    """The numbers in CUDA_VISIBLE_DEVICES; None without it, or where it names GPUs by UUID (see `node_gpus`)."""
    entries = _entries(environ)
    return None if entries is None or _by_uuid(entries) else [int(entry) for entry in entries]


def node_gpus() -> int:
    """GPUs of this node that a process may use, whatever CUDA_VISIBLE_DEVICES numbers.

    UUIDs in it (MIG, some schedulers) are all that is known of the node: their number then.
    """
    entries = _entries(os.environ)
    if entries is not None and _by_uuid(entries):
        return len(entries)
    import torch  # seconds, and supervisors do without

    return _count_gpus() or torch.cuda.device_count()


def device_name(device: torch.device) -> str:
    """What a device is called where a measurement is told: the card's name, or the CPU with this process' threads."""
    import torch  # seconds, and supervisors do without

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def child_device(device: str, environ: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """How a child reaches a device of `choose_devices`: its name there, and what the child's environment needs."""
    index = parse_device(device)
    if index is None:
        return device, {}
    entries = _entries(environ)
    return "cuda:0", {VISIBLE: entries[index] if entries is not None and _by_uuid(entries) else str(index)}


@functools.cache
def _count_gpus() -> int:
    """What the CUDA driver counts for a process that is shown everything; containers and cgroups still hide theirs.

    Asked in a child: the driver reads CUDA_VISIBLE_DEVICES once in a process. 0 where it cannot be asked.
    """
    environ = {name: value for name, value in os.environ.items() if name != VISIBLE}
    command = [sys.executable, "-S", "-c", _COUNT]
    try:
        asked = subprocess.run(command, env=environ, capture_output=True, timeout=COUNT_SECONDS, check=True)
        return int(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def _entries(environ: Mapping[str, str]) -> list[str] | None:
    value = environ.get(VISIBLE)
    return None if value is None else [entry.strip() for entry in value.split(",") if entry.strip()]


def _by_uuid(entries: Sequence[str]) -> bool:
    return not all(entry.isdecimal() for entry in entries)
