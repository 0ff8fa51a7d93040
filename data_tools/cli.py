"""The command line's options and what they do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from data_tools.build import build
from data_tools.classes import ClassView
from data_tools.sources import SOURCES
from data_tools.spec import BuildSpec, default_root
from data_tools.upload import upload
from data_tools.verify import print_report, verify
from trainer.data.tasks import split_classes
from trainer.errors import ConfigError, UserError

NATIVE = {"digits": (8, 1), "idx": (32, 1), "cifar10": (32, 3), "cifar100": (32, 3)}  # size and channels by default


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise UserError(f"{self.prog}: {message}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for options that do not exist or do not go together."""
    parser = _Parser(prog="data_tools", description="Data sets to task shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make the task shards that are missing")
    make.add_argument("--source", required=True, choices=SOURCES)
    make.add_argument("--path", default="", help="the raw images")
    make.add_argument("--out", help="root of the data set; by default data/<name>-<size>-<hash>")
    make.add_argument("--name", help="by default the source")
    make.add_argument("--image-size", type=int, help="8 for digits, 32 for idx and CIFAR, else to be given")
    make.add_argument("--channels", type=int, choices=(1, 3), help="1 for digits and idx, else 3")
    make.add_argument(
        "--class-list", default="", help="file of class names, one per line: which classes, in which order"
    )
    make.add_argument("--tasks", help='explicit tasks, as "[[0,1],[2,3]]"')
    make.add_argument("--classes-per-task", type=int)
    order = make.add_mutually_exclusive_group()
    order.add_argument("--class-order-seed", type=int, help="shuffle the classes before they are cut into tasks")
    order.add_argument("--class-order", help="order of the classes, as 3,1,0,2")
    make.add_argument("--shard-size", type=int, default=1000, help="images per shard")
    make.add_argument(
        "--format", choices=("png", "raw"), default="png", help="raw: larger files, read thirty times as fast"
    )
    make.add_argument(
        "--small-images",
        choices=("pad", "enlarge"),
        default="pad",
        help="images below the size: a black border, or enlarged",
    )
    make.add_argument(
        "--skip-broken", type=_count, default=0, metavar="N", help="leave out up to N images that cannot be read"
    )
    send = commands.add_parser("upload", help="copy a built data set into a store; again: what is missing there")
    send.add_argument("root", type=Path, help="of the built data set")
    send.add_argument("url", help="as s3://bucket/name; credentials come from the environment")
    check = commands.add_parser("verify", help="check every byte, count, label and image")
    check.add_argument("root", type=Path)
    for command in (make, check):
        command.add_argument("--workers", type=_count, default=0, metavar="N", help="processes; by default the cores")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def run_build(options: argparse.Namespace) -> int:
    """Build and say where. Raises UserError."""
    spec = _spec(options)
    root = Path(options.out) if options.out else default_root(spec.name, spec)
    card = build(spec, root, True, options.workers, options.skip_broken)
    print(f"{root}: {len(card.classes)} classes, {len(card.tasks)} tasks {card.tasks}")
    return 0


def run_upload(options: argparse.Namespace) -> int:
    """Upload and say how much. Raises UserError."""
    sent = upload(options.root, options.url, progress=True)
    print(f"{options.url}: {sent.shards} shards of {sent.bytes / 1e6:.1f} MB sent, {sent.kept} were there")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Print the report. Raises UserError where there is no data set."""
    report = verify(options.root, options.workers, progress=True)
    print_report(report)
    return 1 if report.damage else 0


def _spec(options: argparse.Namespace) -> BuildSpec:
    size, channels = NATIVE.get(options.source, (options.image_size, 3))
    size = size if options.image_size is None else options.image_size
    if size is None:
        raise ConfigError(f"--image-size: must be given for --source {options.source}")
    spec = BuildSpec(
        name=options.name or options.source,
        source=options.source,
        tasks=[],
        image_size=size,
        channels=options.channels or channels,
        source_path=options.path,
        class_list=options.class_list,
        shard_size=options.shard_size,
        format=options.format,
        small_images=options.small_images,
    )
    return replace(spec, tasks=_tasks(options, spec))


def _tasks(options: argparse.Namespace, spec: BuildSpec) -> list[list[int]]:
    split = [options.classes_per_task, options.class_order_seed, options.class_order]
    if options.tasks is not None:
        if any(value is not None for value in split):
            raise ConfigError("--tasks: goes without --classes-per-task, --class-order-seed and --class-order")
        return _explicit(options.tasks)
    if options.classes_per_task is None:
        raise ConfigError("--classes-per-task or --tasks: one of them must be given")
    order = [] if options.class_order is None else _order(options.class_order)
    return split_classes(len(ClassView(spec).names), options.classes_per_task, options.class_order_seed, order=order)


def _explicit(text: str) -> list[list[int]]:
    """Tasks written as JSON."""
    try:
        tasks = json.loads(text)
    except ValueError:
        tasks = None
    if not isinstance(tasks, list) or not all(isinstance(task, list) for task in tasks):
        raise ConfigError(f"--tasks {text}: not of the form [[0,1],[2,3]]")
    if not all(type(class_id) is int for task in tasks for class_id in task):
        raise ConfigError(f"--tasks {text}: class ids are whole numbers")
    return tasks


def _order(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--class-order {text}: not of the form 3,1,0,2") from None
