"""Building task shards from raw images: incremental, atomic, the same bytes every time and with any number of workers.

Layout: `<root>/<train|test>/task-<k>/<split>-<k>-<n>.tar` with an `index.json` that is written after its shards, and
`<root>/dataset.json` written after everything. What is complete is kept; what is missing is made. An interrupted build
is continued by the same call; `spool` keeps what it had made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_tools.classes import ClassView, names_agree, read_class_list
from data_tools.crew import Crew, cores
from data_tools.jobs import assemble_job, encode, encode_job
from data_tools.lock import root_lock
from data_tools.progress import progress
from data_tools.sources.base import SPLITS, PlacedSource
from data_tools.spec import BuildSpec, check_spec, differences, tasks_agree
from data_tools.spool import UNIT, Piece, open_spool, read_spool, remove_spool, units
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
from trainer.errors import ConfigError, UserError, say
from trainer.seeds import derive

MAX_THREADS = 8
BROKEN_NAMED = 5  # broken images named in one message
Samples = list[tuple[int, int]]
Item = TypeVar("Item")


def build(spec: BuildSpec, root: Path, progress: bool, workers: int = 0, skip_broken: int = 0) -> DatasetCard:
    """Make the task shards that a spec asks for and that are not there yet.

    Tasks are only ever appended and class ids never change. Where nothing is missing the raw images are not needed.

    Args:
        progress: show a bar on a terminal, a line a minute elsewhere.
        workers: processes that read images; 0: as many as there are cores. The bytes do not depend on it.
        skip_broken: leave out up to so many images that cannot be read; the index of their task names them.

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
            return _complete(spec, root) or _build(spec, root, _How(progress, workers, skip_broken))
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
class _How:
    """What `build` was told beside what to build."""

    progress: bool
    workers: int
    skip_broken: int


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


def _build(spec: BuildSpec, root: Path, how: _How) -> DatasetCard:
    view = ClassView(spec)
    tasks = split_classes(len(view.names), 1, tasks=spec.tasks)  # checks that the classes exist, once each
    if (root / DATASET_NAME).is_file():
        card = read_card(root)
        if not names_agree(view.names, card.classes):
            raise ConfigError(f"{root}: the raw images have other classes than those built; key data.source_path")
        tasks = max(tasks, card.tasks, key=len)
    missing = [part for part in _parts(tasks) if not _is_built(spec, root, part, view.names)]
    listed = [(part, _list_samples(view, part)) for part in missing]
    if isinstance(view.source, PlacedSource):
        _build_placed(spec, root, view, view.source, listed, how)
    else:
        with progress(how.progress, f"building {spec.name}", sum(len(samples) for _, samples in listed)) as advance:
            for part, samples in listed:
                _build_part(spec, root, view, part, samples, advance)
    card = DatasetCard(
        name=spec.name,
        image_size=spec.image_size,
        channels=spec.channels,
        format=spec.format,
        classes=view.names,
        tasks=tasks,
        spec=spec.identity(),
    )
    remove_spool(root)
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
    _check_classes(view, part, {class_id for _, class_id in samples})
    ids = np.array([id for id, _ in samples], dtype=np.uint64)
    rank = derive(0, f"shards/{part.split}", ids)
    return [samples[position] for position in np.lexsort((ids, rank))]


def _check_classes(view: ClassView, part: _Part, found: set[int]) -> None:
    empty = sorted(set(part.classes) - found)
    if empty:
        names = ", ".join(f"{class_id} ({view.names[class_id]})" for class_id in empty)
        raise UserError(f"task {part.task}: no {part.split} image of class {names}; key data.source_path")


def _build_part(
    spec: BuildSpec, root: Path, view: ClassView, part: _Part, samples: Samples, advance: Callable[[int], None]
) -> None:
    """Of images that lie in memory."""
    directory = part.directory(root)
    _clear(directory)
    shards: list[ShardEntry] = []
    with ThreadPoolExecutor(min(MAX_THREADS, cores())) as threads:
        for number, chunk in enumerate(_chunks(spec, samples)):
            members = list(threads.map(lambda sample: _encode(spec, view, part.split, *sample), chunk))
            labels = [class_id for _, class_id in chunk]
            shards.append(write_shard(directory / _shard_name(part, number), members, labels))
            advance(len(chunk))
    write_index(directory, _index(spec, view, part, shards))


def _build_placed(
    spec: BuildSpec, root: Path, view: ClassView, source: PlacedSource, listed: list[tuple[_Part, Samples]], how: _How
) -> None:
    """Of images that lie in files: first all are brought to size and kept, then the shards are put together."""
    count = sum(len(samples) for _, samples in listed)
    directory = open_spool(root, spec.identity())
    places = {_key(part.split, id): source.place(part.split, id) for part, samples in listed for id, _ in samples}
    pieces = read_spool(directory, places)
    with Crew(min(how.workers or cores(), -(-count // UNIT))) as crew:
        unread = {key: place for key, place in places.items() if key not in pieces}
        jobs = [encode_job(directory, spec, unit) for unit in units(unread)]
        with progress(how.progress, f"building {spec.name}", count, len(pieces)) as advance:
            broken = {key: problem for found in crew.run(jobs, advance) for key, problem in found.items()}
        _judge_broken(broken, how.skip_broken)
        pieces = read_spool(directory, places)
        if len(pieces) + len(broken) != len(places):
            raise UserError(f"{directory}: was altered while it was in use: the same command continues; key data.root")
        with progress(how.progress, f"writing {spec.name}", count) as advance:
            for part, samples in listed:
                _write_part(spec, root, view, part, samples, pieces, broken, crew, advance)


def _judge_broken(broken: dict[str, str], allowed: int) -> None:
    """Raises UserError, naming some of the images that cannot be read, where there are more than may be left out."""
    problems = list(broken.values())
    if len(problems) <= allowed:
        for problem in problems:
            say(f"left out: {problem}")
        return
    more = f" and {len(problems) - BROKEN_NAMED} more" if len(problems) > BROKEN_NAMED else ""
    raise UserError(
        f"{'; '.join(problems[:BROKEN_NAMED])}{more}: mend them, or leave them out by "
        f"`python -m data_tools build --skip-broken {len(problems)}`"
    )


def _write_part(
    spec: BuildSpec,
    root: Path,
    view: ClassView,
    part: _Part,
    samples: Samples,
    pieces: dict[str, Piece],
    broken: dict[str, str],
    crew: Crew,
    advance: Callable[[int], None],
) -> None:
    """The shards of a part that are not there yet, then its index."""
    directory = part.directory(root)
    keyed = [(_key(part.split, id), class_id) for id, class_id in samples]
    sound = [(key, class_id, pieces[key]) for key, class_id in keyed if key not in broken]
    _check_classes(view, part, {class_id for _, class_id, _ in sound})
    chunks = _chunks(spec, sound)
    names = [_shard_name(part, number) for number in range(len(chunks))]
    _clear(directory, keep=names)
    jobs = [assemble_job(directory / name, chunk) for name, chunk in zip(names, chunks, strict=True)]
    shards = [ShardEntry(**entry) for entry in crew.run(jobs, advance)]
    left_out = {key: broken[key] for key, _ in keyed if key in broken}
    write_index(directory, _index(spec, view, part, shards, left_out))


def _index(
    spec: BuildSpec, view: ClassView, part: _Part, shards: list[ShardEntry], left_out: dict[str, str] | None = None
) -> SplitIndex:
    return SplitIndex(
        dataset=spec.name,
        split=part.split,
        task=part.task,
        image_size=spec.image_size,
        channels=spec.channels,
        format=spec.format,
        classes=part.classes,
        shards=shards,
        names=[view.names[class_id] for class_id in part.classes],
        spec={**spec.identity(), **({"left_out": left_out} if left_out else {})},
    )


def _encode(spec: BuildSpec, view: ClassView, split: str, id: int, class_id: int) -> Sample:
    image = view.source.load(split, id)
    extension, data = encode(image, spec.image_size, spec.channels, spec.format, spec.small_images)
    return Sample(_key(split, id), {extension: data, LABEL_EXTENSION: str(class_id).encode()})


def _key(split: str, id: int) -> str:
    return f"{split}-{id:06d}"


def _chunks(spec: BuildSpec, samples: list[Item]) -> list[list[Item]]:
    """Of each shard."""
    return [samples[start : start + spec.shard_size] for start in range(0, len(samples), spec.shard_size)]


def _shard_name(part: _Part, number: int) -> str:
    return f"{part.split}-{part.task:02d}-{number:05d}.tar"


def _clear(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove what an interrupted or damaged build left; the index first, so that nobody takes the rest for whole."""
    if directory.is_dir():
        (directory / INDEX_NAME).unlink(missing_ok=True)
        for path in (*directory.glob("*.tar"), *directory.glob(".*.tmp")):
            if path.name not in keep:
                path.unlink()
