"""Verifying a built data set: every byte, count, label and image."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.crew import Crew, cores
from data_tools.jobs import Job, verify_job
from data_tools.progress import progress as bar
from data_tools.sources.base import SPLITS
from data_tools.spool import UNIT
from trainer.data.images import decode_image, image_extension
from trainer.data.shards import (
    LABEL_EXTENSION,
    TAR_ERRORS,
    DatasetCard,
    ShardEntry,
    SplitIndex,
    check_shard,
    read_card,
    read_index,
    tar_members,
    task_directory,
)
from trainer.errors import UserError, one_line


@dataclass(frozen=True)
class Row:
    """What one split of one task holds."""

    split: str
    task: int
    per_class: dict[int, int]
    shards: int
    bytes: int


@dataclass
class Report:
    """`damage` has one line per thing that is wrong; empty for a sound data set."""

    root: Path
    rows: list[Row] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def verify(root: Path, workers: int = 0, progress: bool = False) -> Report:
    """Check sizes, checksums, counts, keys, labels, classes of each task, and decode every image.

    Args:
        workers: processes; 0: as many as there are cores. The report does not depend on it.

    Raises:
        UserError: there is no data set.
    """
    card = read_card(root)
    report = Report(root)
    damage: list[list[str]] = []  # of each index, with its shards
    jobs: list[tuple[int, Job]] = []
    for task in range(1, len(card.tasks) + 1):
        for split in SPLITS:
            directory = task_directory(root, split, task)
            try:
                index = read_index(directory)
            except UserError as error:
                damage.append([str(error)])
                continue
            damage.append(_index_problems(directory, index, card, split, task))
            shape = (index.image_size, index.channels)
            jobs += [(len(damage) - 1, verify_job(directory / entry.name, entry, *shape)) for entry in index.shards]
            report.rows.append(_row(index))
    count = sum(sum(row.per_class.values()) for row in report.rows)
    with Crew(min(workers or cores(), -(-count // UNIT))) as crew, bar(progress, f"verifying {root}", count) as advance:
        found = crew.run([job for _, job in jobs], advance)
    for (place, _), problems in zip(jobs, found, strict=True):
        damage[place] += problems
    report.damage = [line for lines in damage for line in lines]
    return report


def print_report(report: Report) -> None:
    """A short table on stdout and one line per damage."""
    table = Table("task", "split", "classes", "images", "shards", "MB", title=str(report.root))
    for row in report.rows:
        classes = ", ".join(f"{class_id}: {count}" for class_id, count in sorted(row.per_class.items())[:6])
        more = ", ..." if len(row.per_class) > 6 else ""
        images = str(sum(row.per_class.values()))
        table.add_row(str(row.task), row.split, classes + more, images, str(row.shards), f"{row.bytes / 1e6:.1f}")
    Console().print(table)
    for line in report.damage:
        print(line)
    print(f"{report.root}: {'damaged' if report.damage else 'sound'}")


def _row(index: SplitIndex) -> Row:
    per_class = Counter(label for entry in index.shards for label in entry.labels)
    size = sum(entry.bytes for entry in index.shards)
    return Row(index.split, index.task, dict(per_class), len(index.shards), size)


def _index_problems(directory: Path, index: SplitIndex, card: DatasetCard, split: str, task: int) -> list[str]:
    problems: list[str] = []
    found = (index.split, index.task, index.classes, index.image_size, index.channels, index.format)
    if found != (split, task, card.tasks[task - 1], card.image_size, card.channels, card.format):
        problems.append("split, task, classes, image shape or format are not those of dataset.json")
    labels = {label for entry in index.shards for label in entry.labels}
    if labels != set(index.classes):
        problems.append(f"holds classes {sorted(labels)}, {sorted(index.classes)} expected")
    keys = Counter(key for entry in index.shards for key in entry.keys)
    problems += [f"key {key} occurs {count} times" for key, count in keys.items() if count > 1]
    listed = {entry.name for entry in index.shards}
    problems += [
        f"{path.name} is not in the index" for path in sorted(directory.glob("*.tar")) if path.name not in listed
    ]
    return [f"{directory}: {problem}" for problem in problems]


def shard_problems(path: Path, entry: ShardEntry, image_size: int, channels: int) -> list[str]:
    """What is wrong with a shard, a line each."""
    try:
        check_shard(path, entry, sha256=True)
        members = _tar_members(path)
    except UserError as error:
        return [str(error)]
    wanted = {
        f"{key}.{extension}": tuple(span)
        for key, spans in zip(entry.keys, entry.offsets, strict=True)
        for extension, span in spans.items()
    }
    if members != wanted:
        odd = sorted(dict(set(members.items()) ^ set(wanted.items())))
        return [f"{path}: members are not where the index says ({one_line(', '.join(odd[:3]))})"]
    if len(entry.labels) != entry.count:
        return [f"{path}: the index has no labels for it"]
    data = path.read_bytes()
    return [
        f"{path}: sample {key}: {problem}"
        for key, spans, label in zip(entry.keys, entry.offsets, entry.labels, strict=True)
        if (problem := _sample_problem(data, spans, label, image_size, channels))
    ]


def _sample_problem(data: bytes, spans: dict[str, list[int]], label: int, image_size: int, channels: int) -> str:
    members = {extension: data[first : first + size] for extension, (first, size) in spans.items()}
    extension = image_extension(spans)
    if extension is None or members.get(LABEL_EXTENSION) != str(label).encode():
        return f"needs one image and the label {label}, holds {sorted(members)}"
    try:
        decode_image(members[extension], extension, image_size, channels)
    except UserError as error:
        return str(error)
    return ""


def _tar_members(path: Path) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar_members(tar)}
    except TAR_ERRORS as error:
        raise UserError(f"{path}: not a tar ({one_line(error)})") from None
