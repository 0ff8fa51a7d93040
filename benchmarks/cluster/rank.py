"""One rank of a trial: steps of the engine and plain collectives, timed and counted. `benchmarks/scaling.py` starts it.

    deepspeed benchmarks/cluster/rank.py --out FILE --config digits.yaml [section.key=value ...]

The first rank writes one JSON object: seconds of a step, what a step sends (collectives by name, with their bytes;
bytes that went through the network interfaces of this process' network), and seconds of all-reduces by their size.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.cli import Parser, run_main
from trainer.config import Config
from trainer.data.shards import write_atomic
from trainer.engine import Engine
from trainer.methods import build_method
from trainer.rates import trial_examples, trial_step
from trainer.settings import load_config
from trainer.steps import count_parameters, fresh_model
from trainer.world import World, join_world, leave_world

WARM_UPS, STEPS = 3, 12
SIZES = tuple(4**power for power in range(1, 13))  # bytes of an all-reduce: 4 B to 16 MiB
REDUCES = 20
COLLECTIVES = ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


def sent_bytes() -> int:
    """Bytes that left by the interfaces of this process' network, with what frames and acknowledgements add."""
    rows = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(row.partition(":")[2].split()[8]) for row in rows)


@contextmanager
def counted(calls: Counter[str], volume: Counter[str]) -> Iterator[None]:
    """Count the collectives of this process by name, and the bytes of the larger of the tensors of each."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str, *arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        calls[name] += 1
        volume[name] += max((tensor.nbytes for tensor in tensors), default=0)
        return originals[name](*arguments, **named)

    for name in COLLECTIVES:
        setattr(dist, name, partial(counting, name))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def try_steps(config: Config, world: World) -> dict[str, Any]:
    """A step of the method with replay beside it: this rank's share of the configuration's batch."""
    method = build_method(config)
    calls: Counter[str] = Counter()
    volume: Counter[str] = Counter()
    with closing(Engine(fresh_model(config), config, world)) as engine:
        make = partial(trial_examples, config, dtype=engine.dtype, device=world.device)
        images, points = config.train.global_batch // world.size, config.replay_batch // world.size
        real, replayed = make(images), make(points)
        for _ in range(WARM_UPS):
            trial_step(engine, method, real, replayed)
        world.barrier()
        seconds, before = [], sent_bytes()
        for _ in range(STEPS):
            began = time.perf_counter()
            trial_step(engine, method, real, replayed)
            seconds.append(time.perf_counter() - began)
        world.barrier()
        sent = sent_bytes() - before
        with counted(calls, volume):
            trial_step(engine, method, real, replayed)
    return {
        "seconds": statistics.median(seconds),
        "quartiles": statistics.quantiles(seconds, n=4),
        "sent_bytes": sent / STEPS,  # of all ranks of this network together
        "calls": dict(calls),
        "volume": dict(volume),
    }


def try_link(world: World) -> list[dict[str, float]]:
    """Seconds of an all-reduce by its size."""
    rows: list[dict[str, float]] = []
    for size in SIZES:
        tensor = torch.zeros(size // 4)
        taken: list[float] = []
        for _ in range(REDUCES):
            world.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append(time.perf_counter() - began)
        rows.append({"bytes": size, "seconds": statistics.median(taken)})
    return rows


def main(argv: list[str]) -> int:
    parser = Parser(prog="benchmarks/cluster/rank.py", description="One rank of a trial.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, options.overrides)
    world = join_world(0, config.train.threads)
    answer = {"ranks": world.size, "parameters": count_parameters(config), **try_steps(config, world)}
    answer["link"] = try_link(world) if world.size > 1 else []
    if world.is_main:
        write_atomic(options.out, json.dumps(answer).encode())
    leave_world(world, 0)


if __name__ == "__main__":
    run_main(main)
    sys.exit(0)
