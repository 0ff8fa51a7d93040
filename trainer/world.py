"""The training world: which ranks train, on which device, and the few collectives outside the engine.

Nothing here compiles anything: DeepSpeed's shared-memory collective for CPUs, which would need a C++ compiler and leaks
/dev/shm, is switched off before it is looked for.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.config import ClusterConfig
from trainer.contact import Contact
from trainer.errors import ToldElsewhere, UserError, disk_error
from trainer.lifeline import tie_to_launcher
from trainer.stop import Stopped

# Of the words between ranks, which wait for work of one rank alone (an evaluation, a data set to build): `Contact`
# notices within cluster.timeout when that rank is gone, and ends this process.
PATIENCE = timedelta(days=30)
NAME_WORDS = 8  # 64-bit integers that hold the name of a host
SIOCGIFADDR = 0x8915
PLACES = "palimpsest"  # keys in the main rank's store
CLAIM_SECONDS = 60.0  # a job that has lost a rank, or was told to stop, saves and ends before: it makes room
T = TypeVar("T")


class PortTaken(RuntimeError):
    """Another program listens at the main rank's port. No UserError: a second start may find it free."""

    def __init__(self) -> None:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        super().__init__(f"{place}: another program has this port; end it, or take another (deepspeed --master_port)")


@dataclass(frozen=True)
class Role:
    """What a launched rank is for, with its place among the ranks of its kind over all nodes."""

    kind: Literal["trainer", "teacher"]
    index: int
    count: int
    environ: dict[str, str] = field(default_factory=dict)  # what a trainer rank changes before it joins the world


@dataclass(frozen=True)
class World:
    """This rank's place among the trainer ranks; every method is a collective of all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any = None  # a ProcessGroup: gloo, for words between ranks, that may come as late as they like
    contact: Contact | None = None  # of several ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        """What every rank says, in rank order: 64-bit integers, equally many of each."""
        row = [int(word) for word in words]
        if self.size == 1:
            return [row]
        rows = torch.empty((self.size, len(row)), dtype=torch.int64)
        dist.all_gather_into_tensor(rows, torch.tensor([row], dtype=torch.int64), group=self.control)
        return rows.tolist()

    def broadcast_int(self, value: int) -> int:
        """The main rank's value (64 bit), on every rank."""
        return self.exchange([value])[0][0]

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor, on this world's device, with the main rank's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; so also a point that every rank has reached."""
        return any(row[0] for row in self.exchange([flag]))

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on the main rank while the others wait; its value there, None on the others.

        Raises:
            UserError, Stopped: on every rank when the main one raised it, so that all end and none waits for ever.
        """
        return self._agreed(work) if self.is_main else self._agreed(lambda: None)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do something on the main rank, then on all the others, which find there what the main one has kept.

        Raises:
            UserError, Stopped: on every rank when one raised it.
        """
        value = self.on_main(work)
        if self.size == 1:
            return cast("T", value)
        return self._agreed(lambda: cast("T", value) if self.is_main else work())

    def _agreed(self, work: Callable[[], T]) -> T:
        """What this rank's work gives, once that of every rank has succeeded."""
        value: T | None = None
        failure: UserError | Stopped | None = None
        try:
            value = work()
        except (UserError, Stopped) as error:
            failure = error
        except OSError as error:
            failure = disk_error(error)
        rows = self.exchange([failure is not None, isinstance(failure, Stopped)])
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if any(row[1] for row in rows):
            raise failure if isinstance(failure, Stopped) else Stopped(f"{_named(failed[0])} was stopped")
        if failed:
            raise failure or ToldElsewhere(f"{_named(failed[0])} failed")
        return cast("T", value)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Equal-shaped tensors (N, ...) of all ranks as (size * N, ...), in rank order."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, which takes the place of this one."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def split_ranks(environ: Mapping[str, str], devices_per_node: int) -> Role:
    """The role of the rank that a launcher described in `environ`, when the last local ranks of each node teach.

    Trainer ranks and teacher ranks are each numbered from 0 over the nodes, which must have equal numbers of ranks.

    Raises:
        UserError: no trainer rank is left, or the nodes are unequal.
    """
    rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(environ.get("LOCAL_RANK", "0")), _local_size(environ)
    if devices_per_node == 0:
        return Role("trainer", rank, world_size)
    trainers = local_size - devices_per_node
    if trainers < 1:
        raise UserError(
            f"replay.devices_per_node={devices_per_node}: no rank is left to train of the {local_size} started on this "
            "node; start more (deepspeed --num_gpus N) or take replay.placement=subprocess"
        )
    node, place = divmod(rank, local_size)
    if world_size % local_size or place != local_rank:
        raise UserError(
            "replay.placement=ranks: needs nodes with equal numbers of ranks; make the slots of the hostfile equal"
        )
    nodes = world_size // local_size
    if local_rank >= trainers:
        return Role("teacher", node * devices_per_node + local_rank - trainers, nodes * devices_per_node)
    index, count = node * trainers + local_rank, nodes * trainers
    changed = {"RANK": index, "WORLD_SIZE": count, "LOCAL_SIZE": trainers, "LOCAL_WORLD_SIZE": trainers}
    return Role("trainer", index, count, {name: str(value) for name, value in changed.items()})


def join_world(placement_ranks_devices_per_node: int, threads: int, timeout: float = ClusterConfig.timeout) -> World:
    """Join the training world; once in a process, on trainer ranks only (`split_ranks` says which they are).

    Args:
        placement_ranks_devices_per_node: local ranks of each node that teach; 0 with every other placement.
        threads: CPU threads of this rank; 0 shares the cores out between the local ranks.
        timeout: seconds within which all ranks must join, each collective of the engine must end and each rank must
            give a sign of life; after that this rank fails instead of waiting on.

    Raises:
        PortTaken: another program has the main rank's port.
    """
    assert not dist.is_initialized(), "a process joins one world, once"
    tie_to_launcher()
    local_ranks = _local_size(os.environ)
    role = split_ranks(os.environ, placement_ranks_devices_per_node)
    assert role.kind == "trainer", "teacher ranks stay outside the training world"
    os.environ.update(role.environ)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    _stand_alone()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        _init_distributed(device, timedelta(seconds=timeout))
    except dist.DistNetworkError as error:
        raise PortTaken() if "EADDRINUSE" in str(error) else error from None
    world = _in_contact(World(dist.get_rank(), dist.get_world_size(), local_rank, device), timeout)
    close_places(timeout)
    return world


def claim_place(timeout: float) -> None:
    """See to it that what answers at the main rank's port is the main rank of this job.

    A rank that joins another job there (the same command, started twice on several hosts) waits for a main rank that
    never comes. So each rank first takes its number in the store that it finds; in a job that is complete none is left.
    One that is about to end is waited for.

    Args:
        timeout: seconds until the main rank must answer.

    Raises:
        PortTaken: by another job.
    """
    rank = os.environ["RANK"]
    if rank == "0" or _is_agents_store():
        return
    token, deadline = uuid.uuid4().hex, time.monotonic() + CLAIM_SECONDS
    while True:
        store = _store(timeout)
        try:
            mine = store.compare_set(f"{PLACES}/rank-{rank}", "", token) == token.encode()
            if mine and not store.check([f"{PLACES}/complete"]):
                return
        except dist.DistNetworkError:  # it has ended just now
            pass
        if time.monotonic() > deadline:
            raise PortTaken()
        time.sleep(0.5)


def close_places(timeout: float) -> None:
    """On the main rank, once all ranks have joined: no other may take a place any more. (See `claim_place`.)"""
    if os.environ["RANK"] == "0" and os.environ["MASTER_PORT"] != "0" and not _is_agents_store():
        _store(timeout).set(f"{PLACES}/complete", "")


def leave_world(world: World, code: int) -> NoReturn:
    """End this process with the given exit code: with all the others after success, at once after a failure.

    Past the interpreter's own shutdown, in which the threads of collectives abort now and then.
    """
    if code == 0:
        if world.contact is not None:
            world.contact.leave()
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches `host` (IPv4), loopback for itself; None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it only chooses the route
            address = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _in_contact(world: World, timeout: float) -> World:
    """The world with the groups by which its ranks speak with each other; collective."""
    if world.size == 1:
        return world
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    raw = socket.gethostname().encode()[: 8 * NAME_WORDS].ljust(8 * NAME_WORDS, b"\0")
    rows = replace(world, control=group).exchange(struct.unpack(f"{NAME_WORDS}q", raw))
    hosts = [struct.pack(f"{NAME_WORDS}q", *row).rstrip(b"\0").decode(errors="replace") for row in rows]
    contact = Contact(timeout, group, hosts)
    contact.start()
    # Not before: a host that is lost while this group is made would be waited for as long as the group waits.
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return replace(world, control=control, contact=contact)


def _store(timeout: float) -> TCPStore:
    """A connection to the store that the main rank keeps."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*place, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def _is_agents_store() -> bool:
    """torchrun's store belongs to its agent and lives on when ranks are started again."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _named(rank: int) -> str:
    return "the main rank" if rank == 0 else f"rank {rank}"


def _local_size(environ: Mapping[str, str]) -> int:
    """Ranks on this node: deepspeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or "1")


def _stand_alone() -> None:
    """Without a launcher this process is a world of one, on whichever port is free (0)."""
    if "RANK" in os.environ:
        return
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")


def _init_distributed(device: torch.device, timeout: timedelta) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("GLOO_LOG_LEVEL", "WARN")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # Otherwise gloo takes the address of the host name, which many systems map to 127.0.1.1.
        name = interface_towards(os.environ["MASTER_ADDR"])
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    # Groups that DeepSpeed makes later ask for no timeout and get these defaults.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    if device.type == "cuda":
        # Where NCCL's own watchdog hangs while it ends a late collective, its monitor ends the process: as late.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout.total_seconds())))
        torch.cuda.set_device(device)
    import deepspeed  # slow, and it chooses its accelerator while it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = "nccl" if device.type == "cuda" else "gloo"
    claim_place(timeout.total_seconds())
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
