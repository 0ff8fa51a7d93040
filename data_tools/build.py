"""Building task shards from raw images: incremental, atomic, and the same bytes every time.

Layout: `<root>/<train|test>/task-<k>/<split>-<k>-<n>.tar` with an `index.json` that is written after its shards, and
`<root>/dataset.json` written after everything. What is complete is kept; what is missing is made. An interrupted build
is continued by the same call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.classes import ClassView, names_agree, read_class_list
from data_tools.images import fit
from data_tools.lock import root_lock
from data_tools.sources.base import SPLITS
from data_tools.spec import BuildSpec, check_spec, differences, tasks_agree
from trainer.data.images import encode_image
from trainer.data.shards import (
    DATASET_NAME,
    INDEX_NAME,
    LABEL_EXTENSION,
    DatasetCard,
    Sample,
    ShardEntry,
    SplitIndex,
    check_shard,
    read_card,
    read_index,
    task_directory,
    write_card,
    write_index,
    write_shard,
)
from trainer.data.tasks import split_classes
from trainer.errors import ConfigError, UserError
from trainer.seeds import derive

MAX_THREADS = 8
BROKEN_NAMED = 5  # broken images named in one message
Samples = list[tuple[int, int]]


def build(spec: BuildSpec, root: Path, progress: bool) -> DatasetCard:
    """Make the task shards that a spec asks for and that are not there yet; `progress` shows a bar on a terminal.

    Tasks are only ever appended and class ids never change. Where nothing is missing the raw images are not needed.

    Raises:
        UserError: raw images that are missing or broken, a disk that cannot be written.
        ConfigError: a root that holds another data set, or tasks that cannot be made; the line names the keys.
    """
    check_spec(spec)
    try:
        complete = _complete(spec, root)
        if complete is not None:
            return complete
        with root_lock(root):
            # Another process may have built it while this one waited.
            return _complete(spec, root) or _build(spec, root, progress)
    except OSError as error:
        where = Path(str(error.filename or root))
        key = "data.root" if root in (where, *where.parents) else "data.source_path"
        raise UserError(f"{where}: {error.strerror or error}; key {key}") from None


def check_same(spec: BuildSpec, root: Path | str, card: DatasetCard) -> None:
    """Refuse a root that holds another data set than the spec's.

    Raises:
        ConfigError: naming every key that differs.
    """
    problems = [str(difference) for difference in differences(spec, card.spec)]
    if not tasks_agree(spec.tasks, card.tasks):
        problems.append(f"data.tasks (built {card.tasks}, wanted {spec.tasks})")
    if spec.class_list and not names_agree(read_class_list(spec.class_list), card.classes):
        problems.append("data.class_list (names other classes or another order)")
    if 0 < spec.classes < len(card.classes):
        problems.append(f"data.classes (built with {len(card.classes)}, wanted {spec.classes})")
    if problems:
        raise ConfigError(f"{root}: holds another data set, choose another data.root: differs in {'; '.join(problems)}")


@dataclass(frozen=True)
class _Part:
    """One split of one task: what has an index of its own."""

    split: str
    task: int
    classes: list[int]

    def directory(self, root: Path) -> Path:
        return task_directory(root, self.split, self.task)


def _parts(tasks: list[list[int]]) -> list[_Part]:
    return [_Part(split, task, classes) for task, classes in enumerate(tasks, 1) for split in SPLITS]


def _complete(spec: BuildSpec, root: Path) -> DatasetCard | None:
    """The card, where everything the spec asks for is built."""
    if not (root / DATASET_NAME).is_file():
        return None
    card = read_card(root)
    check_same(spec, root, card)
    listed = len(read_class_list(spec.class_list)) if spec.class_list else 0
    if len(card.tasks) < len(spec.tasks) or max(spec.classes, listed) > len(card.classes):
        return None
    whole = all(_is_built(spec, root, part, card.classes) for part in _parts(spec.tasks))
    return card if whole else None


def _build(spec: BuildSpec, root: Path, progress: bool) -> DatasetCard:
    view = ClassView(spec)
    tasks = split_classes(len(view.names), 1, tasks=spec.tasks)  # checks that the classes exist, once each
    if (root / DATASET_NAME).is_file():
        card = read_card(root)
        if not names_agree(view.names, card.classes):
            raise ConfigError(f"{root}: the raw images have other classes than those built; key data.source_path")
        tasks = max(tasks, card.tasks, key=len)
    missing = [part for part in _parts(tasks) if not _is_built(spec, root, part, view.names)]
    listed = [(part, _list_samples(view, part)) for part in missing]
    with _bar(progress) as bar:
        shown = bar.add_task(f"building {spec.name}", total=sum(len(samples) for _, samples in listed))
        for part, samples in listed:
            _build_part(spec, root, view, part, samples, lambda count: bar.advance(shown, count))
    card = DatasetCard(
        name=spec.name,
        image_size=spec.image_size,
        channels=spec.channels,
        format=spec.format,
        classes=view.names,
        tasks=tasks,
        spec=spec.identity(),
    )
    write_card(root, card)
    return card


def _is_built(spec: BuildSpec, root: Path, part: _Part, names: list[str]) -> bool:
    """Whether a part is there with all its shards; damage within a shard is for `verify` and the reader to find.

    Raises:
        ConfigError: an index of another data set.
    """
    directory = part.directory(root)
    if not (directory / INDEX_NAME).is_file():
        return False
    index = read_index(directory)
    problems = [str(difference) for difference in differences(spec, index.spec)]
    if index.classes != part.classes:
        problems.append(f"data.tasks (task {part.task} built with {index.classes}, wanted {part.classes})")
    elif index.names != [names[class_id] for class_id in part.classes]:
        problems.append(f"data.class_list (task {part.task} built with {index.names})")
    if problems:
        raise ConfigError(f"{directory}: built for another data set, choose another data.root: {'; '.join(problems)}")
    try:
        for entry in index.shards:
            check_shard(directory / entry.name, entry, sha256=False)
    except UserError:
        return False
    return True


def _list_samples(view: ClassView, part: _Part) -> Samples:
    """The part's (id, class id) in the order of its shards: shuffled by a hash of the id, the same every time.

    Raises:
        UserError: a class without an image.
    """
    samples = view.samples(part.split, part.classes)
    empty = sorted(set(part.classes) - {class_id for _, class_id in samples})
    if empty:
        names = ", ".join(f"{class_id} ({view.names[class_id]})" for class_id in empty)
        raise UserError(f"task {part.task}: no {part.split} image of class {names}; key data.source_path")
    ids = np.array([id for id, _ in samples], dtype=np.uint64)
    rank = derive(0, f"shards/{part.split}", ids)
    return [samples[position] for position in np.lexsort((ids, rank))]


def _build_part(
    spec: BuildSpec, root: Path, view: ClassView, part: _Part, samples: Samples, advance: Callable[[int], None]
) -> None:
    directory = part.directory(root)
    _clear(directory)
    shards: list[ShardEntry] = []
    broken: list[str] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for start in range(0, len(samples), spec.shard_size):
            chunk = samples[start : start + spec.shard_size]
            encoded = list(threads.map(lambda sample: _encode(spec, view, part.split, *sample), chunk))
            broken += [result for result in encoded if isinstance(result, str)]
            advance(len(chunk))
            if not broken:
                name = f"{part.split}-{part.task:02d}-{len(shards):05d}.tar"
                members = [result for result in encoded if isinstance(result, Sample)]
                shards.append(write_shard(directory / name, members, [class_id for _, class_id in chunk]))
    if broken:
        more = f" and {len(broken) - BROKEN_NAMED} more" if len(broken) > BROKEN_NAMED else ""
        raise UserError("; ".join(broken[:BROKEN_NAMED]) + more)
    index = SplitIndex(
        dataset=spec.name,
        split=part.split,
        task=part.task,
        image_size=spec.image_size,
        channels=spec.channels,
        format=spec.format,
        classes=part.classes,
        shards=shards,
        names=[view.names[class_id] for class_id in part.classes],
        spec=spec.identity(),
    )
    write_index(directory, index)


def _encode(spec: BuildSpec, view: ClassView, split: str, id: int, class_id: int) -> Sample | str:
    """The sample to write, or what is wrong with the raw image: all broken images of a part are told at once."""
    try:
        image = fit(view.source.load(split, id), spec.image_size, spec.channels)
    except UserError as error:
        return str(error)
    extension, data = encode_image(image, spec.format)
    return Sample(f"{split}-{id:06d}", {extension: data, LABEL_EXTENSION: str(class_id).encode()})


def _clear(directory: Path) -> None:
    """Remove what an interrupted or damaged build left; the index first, so that nobody takes the rest for whole."""
    if directory.is_dir():
        (directory / INDEX_NAME).unlink(missing_ok=True)
        for path in (*directory.glob("*.tar"), *directory.glob(".*.tmp")):
            path.unlink()


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))
