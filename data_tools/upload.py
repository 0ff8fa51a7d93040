"""Copying a built data set into a store. Building is left to the disk: it is resumed, locked and verified there.

Shards first, then the index of each split, the card last: whoever reads the store meanwhile sees the data set as it was
or as it will be. A shard that is there with its size is not sent again, so the same command continues.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from data_tools.sources.base import SPLITS
from trainer.data.shards import (
    DATASET_NAME,
    INDEX_NAME,
    SplitIndex,
    check_shard,
    read_card,
    read_index,
    task_directory,
)
from trainer.errors import UserError
from trainer.store import Missing, ObjectStore, Patience, check_url

PATIENCE = Patience(timeout=300.0, request=120.0)
SENDING = 4  # shards at once


@dataclass(frozen=True)
class Sent:
    """Shards that were sent, their bytes, and how many lay there."""

    shards: int
    bytes: int
    kept: int


def upload(root: Path, url: str, progress: bool) -> Sent:
    """Publish the data set at `root` under `url`, every shard checked on the way; `progress` shows a bar.

    Raises:
        UserError: damaged shards, a store that refuses or does not answer, another data set in its place.
    """
    check_url("upload", url, write=True)
    card, store = read_card(root), ObjectStore(url, PATIENCE)
    indexes = {
        task_directory(Path(), split, task): read_index(task_directory(root, split, task))
        for task in range(1, len(card.tasks) + 1)
        for split in SPLITS
    }
    _check_place(store, indexes, root)
    missing: list[tuple[str, int]] = []
    for directory, index in indexes.items():
        found = store.sizes(str(directory))
        for entry in index.shards:
            check_shard(root / directory / entry.name, entry, sha256=True)
            if found.get(entry.name) != entry.bytes:
                missing.append((f"{directory}/{entry.name}", entry.bytes))
    _send(root, store, missing, progress)
    for directory in indexes:
        store.write(f"{directory}/{INDEX_NAME}", (root / directory / INDEX_NAME).read_bytes())
    store.write(DATASET_NAME, (root / DATASET_NAME).read_bytes())
    shards = sum(len(index.shards) for index in indexes.values())
    return Sent(len(missing), sum(size for _, size in missing), shards - len(missing))


def _check_place(store: ObjectStore, indexes: dict[Path, SplitIndex], root: Path) -> None:
    """Raises UserError where an index that is there is of other shards: runs may be reading them."""
    for directory in indexes:
        name = f"{directory}/{INDEX_NAME}"
        try:
            there = store.read(name)
        except Missing:
            continue  # of a missing bucket the listing tells
        if there != (root / directory / INDEX_NAME).read_bytes():
            raise UserError(f"{store.place(name)}: of another data set, or built otherwise; take another place")


def _send(root: Path, store: ObjectStore, missing: list[tuple[str, int]], progress: bool) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("sending"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, disable=not (progress and console.is_terminal))
    with bar, ThreadPoolExecutor(SENDING) as threads:
        shown = bar.add_task("", total=sum(size for _, size in missing))

        def send(name: str, size: int) -> None:
            store.write(name, (root / name).read_bytes())
            bar.advance(shown, size)

        for sent in [threads.submit(send, *shard) for shard in missing]:
            sent.result()
