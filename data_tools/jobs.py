"""What one process does at a time: plain values in, plain values out, so that a line of JSON can ask for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from data_tools.images import fit
from data_tools.sources.base import Pixels, Place, decode, read_place
from data_tools.sources.parquet import read_rows
from data_tools.spec import BuildSpec
from data_tools.spool import Piece, take, write_unit
from trainer.data.images import encode_image
from trainer.data.shards import LABEL_EXTENSION, Sample, ShardEntry, encode_shard, write_atomic
from trainer.errors import UserError

Job = dict[str, Any]
Advance = Callable[[int], None]
STRIDE = 32  # images between two signs of progress


def perform(job: Job, advance: Advance) -> Any:
    """Do a job; `advance` is told of images as they are done. Raises UserError, OSError."""
    does: dict[str, Callable[[Job, Advance], Any]] = {"encode": _encode, "assemble": _assemble, "verify": _verify}
    return does[job["do"]](job, advance)


def encode_job(directory: Path, spec: BuildSpec, unit: list[tuple[str, Place]]) -> Job:
    """Bring images to size and keep them in the spool. Gives what is wrong with the broken ones, by key."""
    rule = {key: getattr(spec, key) for key in ("image_size", "channels", "format", "small_images")}
    return {
        "do": "encode",
        "directory": str(directory),
        "unit": [[key, *astuple(place)] for key, place in unit],
        **rule,
    }


def assemble_job(path: Path, samples: list[tuple[str, int, Piece]]) -> Job:
    """Put a shard together of the spool's images, by key and class id. Gives its entry; a shard that is there already,
    byte for byte, is left alone."""
    return {"do": "assemble", "path": str(path), "samples": [[key, id, *astuple(piece)] for key, id, piece in samples]}


def verify_job(path: Path, entry: ShardEntry, image_size: int, channels: int) -> Job:
    """Check a shard. Gives what is wrong with it, a line each."""
    return {
        "do": "verify",
        "path": str(path),
        "entry": asdict(entry),
        "image_size": image_size,
        "channels": channels,
    }


def encode(image: Pixels, image_size: int, channels: int, format: str, small_images: str) -> tuple[str, bytes]:
    """Extension and bytes of an image's member in a shard."""
    return encode_image(fit(image, image_size, channels, enlarge=small_images == "enlarge"), format)


def _encode(job: Job, advance: Advance) -> dict[str, str]:
    rule = [job[key] for key in ("image_size", "channels", "format", "small_images")]
    encoded: list[tuple[str, Place, str, bytes]] = []
    broken: dict[str, str] = {}
    told = 0
    for number, (key, place, data) in enumerate(_read([(key, Place(*place)) for key, *place in job["unit"]]), 1):
        try:
            if isinstance(data, UserError):
                raise data
            encoded.append((key, place, *encode(decode(io.BytesIO(data), place.name), *rule)))
        except UserError as error:
            broken[key] = str(error)
        if number - told >= STRIDE:
            advance(number - told)
            told = number
    if encoded:
        write_unit(Path(job["directory"]), encoded)
    advance(len(job["unit"]) - told)
    return broken


def _read(unit: list[tuple[str, Place]]) -> Iterator[tuple[str, Place, bytes | UserError]]:
    """The raw bytes of images, file by file, or what is wrong with one. A damaged file of many images raises."""
    for name, group in groupby(unit, key=lambda item: item[1].file):
        part = list(group)
        first = part[0][1]
        if first.group >= 0:
            keys = {place: key for key, place in part}
            for place, data in read_rows([place for _, place in part]):
                yield keys[place], place, data
        else:
            with Path(name).open("rb") if first.size >= 0 else nullcontext() as file:
                for key, place in part:
                    yield key, place, _read_one(place, file)


def _read_one(place: Place, file: IO[bytes] | None) -> bytes | UserError:
    try:
        return read_place(place, file)
    except UserError as error:
        return error


def _assemble(job: Job, advance: Advance) -> dict[str, Any]:
    path = Path(job["path"])
    samples = [(key, class_id, Piece(*piece)) for key, class_id, *piece in job["samples"]]
    images = take([piece for *_, piece in samples])
    members = (
        Sample(key, {piece.extension: data, LABEL_EXTENSION: str(class_id).encode()})
        for (key, class_id, piece), data in zip(samples, images, strict=True)
    )
    entry, data = encode_shard(path.name, members, [class_id for _, class_id, _ in samples])
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        write_atomic(path, data)
    advance(len(samples))
    return asdict(entry)


def _verify(job: Job, advance: Advance) -> list[str]:
    from data_tools.verify import shard_problems

    entry = ShardEntry(**job["entry"])
    problems = shard_problems(Path(job["path"]), entry, job["image_size"], job["channels"])
    advance(entry.count)
    return problems
