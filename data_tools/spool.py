"""Encoded images on their way into shards: what was made once is not made again, whatever ends the build.

Raw images lie class by class, or in any order; shards hold a task's images shuffled. So the raw files are read once,
from front to back, in units of some hundred images, each of which becomes a small tar in `<root>/.spool/` with a list
of what it holds. Shards are then put together from there. The spool takes as much room as the shards do, and goes when
all are written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools.sources.base import Place
from trainer.data.shards import INDEX_LIMIT, Sample, ShardEntry, check_shard, read_regular, write_atomic, write_shard

SPOOL_NAME = ".spool"
SPEC_NAME = "spec.json"
UNIT = 256  # images read by one process before they are safe


@dataclass(frozen=True)
class Piece:
    """An encoded image within a file of the spool."""

    file: str
    first: int
    size: int
    extension: str


def open_spool(root: Path, identity: Mapping[str, object]) -> Path:
    """The directory of the spool; what another build left there, of other settings, is removed."""
    directory = root / SPOOL_NAME
    wanted = json.dumps(dict(identity), sort_keys=True).encode()
    try:
        if read_regular(directory / SPEC_NAME, INDEX_LIMIT) == wanted:
            return directory
    except OSError:
        pass
    remove_spool(root)
    write_atomic(directory / SPEC_NAME, wanted)
    return directory


def remove_spool(root: Path) -> None:
    directory = root / SPOOL_NAME
    if directory.is_dir():
        shutil.rmtree(directory)


def write_unit(directory: Path, encoded: list[tuple[str, Place, str, bytes]]) -> None:
    """Keep images: of each the key, where it was read, the extension and the bytes. The list comes last."""
    keys = [key for key, *_ in encoded]
    name = f"unit-{hashlib.blake2b(' '.join(keys).encode(), digest_size=12).hexdigest()}"
    samples = (Sample(key, {extension: data}) for key, _, extension, data in encoded)
    entry = write_shard(directory / f"{name}.tar", samples)
    content = {"entry": asdict(entry), "places": [astuple(place) for _, place, *_ in encoded]}
    write_atomic(directory / f"{name}.json", json.dumps(content, separators=(",", ":")).encode())


def read_spool(directory: Path, places: Mapping[str, Place]) -> dict[str, Piece]:
    """What is kept of the images asked for, by key. A key whose image lies elsewhere now is another image's."""
    kept = (item for path in sorted(directory.glob("unit-*.json")) for item in _read_unit(path))
    return {key: piece for key, place, piece in kept if places.get(key) == place}


def _read_unit(path: Path) -> list[tuple[str, Place, Piece]]:
    """By its list; a unit that is not whole (a disk's fault) is forgotten, and its images are made again."""
    result: list[tuple[str, Place, Piece]] = []
    try:
        content: Any = json.loads(read_regular(path, INDEX_LIMIT))
        entry = ShardEntry(**content["entry"])
        tar = path.parent / entry.name
        check_shard(tar, entry, sha256=False)
        for key, place, spans in zip(entry.keys, content["places"], entry.offsets, strict=True):
            ((extension, (first, size)),) = spans.items()
            result.append((key, Place(*place), Piece(str(tar), first, size, extension)))
    except (OSError, ValueError, TypeError, KeyError):  # a UserError is a ValueError
        path.unlink(missing_ok=True)
        return []
    return result


def take(pieces: list[Piece]) -> list[bytes]:
    """Their bytes, in the order given; the files are read one after another, each from front to back."""
    data: dict[Piece, bytes] = {}
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.first))
    for name, group in groupby(ordered, key=lambda piece: piece.file):
        with Path(name).open("rb") as file:
            for piece in group:
                file.seek(piece.first)
                data[piece] = file.read(piece.size)
    return [data[piece] for piece in pieces]


def units(places: Mapping[str, Place]) -> list[list[tuple[str, Place]]]:
    """The images to read, in the order in which they lie in their files, cut into units: about UNIT images each, a row
    group never cut in two, so that it is read once."""
    ordered = sorted(places.items(), key=lambda item: (item[1].file, item[1].group, item[1].start))
    result: list[list[tuple[str, Place]]] = []
    for key, place in ordered:
        last = result[-1][-1][1] if result else None
        same = last is not None and place.group >= 0 and (last.file, last.group) == (place.file, place.group)
        if not result or (len(result[-1]) >= UNIT and not same):
            result.append([])
        result[-1].append((key, place))
    return result
