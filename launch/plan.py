"""Print what a configuration will start, without starting it.

python launch/plan.py --config imagenet100.yaml --num_gpus 8 replay.devices_per_node=2
python launch/plan.py --config imagenet100.yaml --measure
python launch/plan.py --config imagenet100.yaml --measure --scale 8,64,512 --link-gb 25 --link-us 20
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from trainer.cli import config_parser, positive, run_main
from trainer.errors import ConfigError
from trainer.plan import as_json, make_plan, rich_plan, with_scales, with_supply
from trainer.scaling import Link
from trainer.settings import load_config


def counts(text: str) -> tuple[int, ...]:
    """Numbers of devices."""
    return tuple(positive(part) for part in text.split(","))


def link(gigabytes: float | None, microseconds: float | None) -> Link:
    """Raises ConfigError where one is not told: it is not guessed. `benchmarks/scaling.py` measures them."""
    if gigabytes is None or microseconds is None or not gigabytes > 0 or not microseconds >= 0:
        raise ConfigError("--scale: needs --link-gb above 0 and --link-us; benchmarks/scaling.py measures them")
    return Link(gigabytes * 1e9, microseconds / 1e6)


def main(argv: list[str]) -> int:
    parser = config_parser("Print what a configuration will start: processes, memory, teacher evaluations, disk.")
    parser.add_argument(
        "--num_gpus", type=positive, help="ranks on this node, as for deepspeed; default: its GPUs, or 1"
    )
    parser.add_argument("--cuda", action="store_true", help="plan for a machine with these GPUs, not for this one")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--measure", action="store_true", help="time trainer and teacher here: how many teachers it takes"
    )
    rates.add_argument("--rates", type=Path, metavar="RUN_DIR", help="the same by what an earlier run has logged")
    parser.add_argument(
        "--scale", type=counts, default=(), metavar="N,N,...", help="predict for so many devices in all"
    )
    parser.add_argument("--link-gb", type=float, metavar="GB/S", help="--scale: what a device sends a second, in GB")
    parser.add_argument("--link-us", type=float, metavar="US", help="--scale: latency of a message, in microseconds")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_intermixed_args(argv)
    launched = options.num_gpus or max(1, torch.cuda.device_count())
    gpus = launched if options.cuda else torch.cuda.device_count()
    config = load_config(options.config, options.overrides)
    plan = make_plan(config, launched, gpus)
    if options.measure or options.rates:
        plan = with_supply(plan, config, options.rates)
    if options.scale:
        plan = with_scales(plan, config, link(options.link_gb, options.link_us), options.scale)
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        Console().print(rich_plan(plan))
    return 0


if __name__ == "__main__":
    run_main(main)
