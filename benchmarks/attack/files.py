"""Faults of files: damaged at rest, or without room."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from attack.scene import FOREIGN_TASK, Fault, Scene, fill_disk, number_of, parsed
from trainer.replay.state import read_json
from trainer.standing import STEP_PREFIX


def flip_bit(path: Path, chance: random.Random, first: int = 0) -> int:
    """Flip one bit at or after byte `first`, in place; the byte's place."""
    place = chance.randrange(first, max(first + 1, path.stat().st_size))
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return place


def cut(path: Path, chance: random.Random) -> int:
    """Truncate to a random length that is shorter; the new length."""
    length = chance.randrange(path.stat().st_size)
    os.truncate(path, length)
    return length


def damage_shard(scene: Scene, damage: Callable[[Path], str | None]) -> Fault | None:
    """Damage a shard that is likely not yet read, one of the latest."""
    shards = scene.shards()
    if not shards:
        return None
    path = scene.random.choice(shards[len(shards) // 2 :])
    try:
        done = damage(path)
        damaged = path.read_bytes() if path.exists() else b""
    except OSError:  # given back at this very moment, or no room
        return None
    if done is None:
        return None
    return Fault(f"{shown(scene, path)}{done}", made_again(scene, path, damaged))


def made_again(scene: Scene, path: Path, damaged: bytes) -> Callable[[], str | None]:
    """Answers once a shard is another than the damaged one, or no longer of use."""
    task, began = scene.task, time.monotonic()

    def followed() -> str | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        if content and content != damaged:
            return f"made again after {time.monotonic() - began:.1f} s"
        progress = read_json(scene.run.replay_progress(task))
        return "had been read before" if progress.get("released", 0) > number_of(path) else None

    return followed


def shown(scene: Scene, path: Path) -> str:
    return str(path.relative_to(scene.run.root))


def truncate_shard(scene: Scene) -> Fault | None:
    return damage_shard(scene, lambda path: f" to {cut(path, scene.random)} bytes")


def flip_shard(scene: Scene) -> Fault | None:
    return damage_shard(scene, lambda path: f" in byte {flip_bit(path, scene.random)}")


def delete_shard(scene: Scene) -> Fault | None:
    def damage(path: Path) -> str:
        path.unlink()
        return ""

    return damage_shard(scene, damage)


def swap_shard(scene: Scene) -> Fault | None:
    """The bytes of another shard of the same pool."""

    def damage(path: Path) -> str | None:
        others = [other for other in scene.shards() if other != path]
        if not others:
            return None
        other = scene.random.choice(others)
        replace(path, other.read_bytes())
        return f" by {other.name}"

    return damage_shard(scene, damage)


def foreign_shard(scene: Scene) -> Fault | None:
    """The bytes of a shard that an earlier teacher has made, in place."""

    def damage(path: Path) -> str | None:
        if not scene.foreign or scene.task <= FOREIGN_TASK:
            return None
        number = scene.random.choice(sorted(scene.foreign))
        replace(path, scene.foreign[number][0])
        return f" by shard {number} of task {FOREIGN_TASK}"

    return damage_shard(scene, damage)


def foreign_line(scene: Scene) -> Fault | None:
    """A shard of an earlier teacher, published in this pool by its own line, as a stray sampler would."""

    def damage(path: Path) -> str | None:
        if scene.task <= FOREIGN_TASK or number_of(path) not in scene.foreign:
            return None
        data, line = scene.foreign[number_of(path)]
        replace(path, data)
        append(scene.manifest, line + b"\n")
        return f" by that of task {FOREIGN_TASK}"

    return damage_shard(scene, damage)


def replace(path: Path, data: bytes) -> None:
    """Put a file in place as a sampler does. Raises OSError."""
    new = path.with_name(f"chaos-{path.name}")
    try:
        new.write_bytes(data)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def damage_manifest(scene: Scene, damage: Callable[[Path, int, int], None]) -> Fault | None:
    """Damage the last line, of `size` bytes from `first`, where it publishes a shard not yet read."""
    lines = scene.lines()
    shards = {number_of(path) for path in scene.shards()}
    last = parsed(lines[-1]) if lines else {}
    if "crc32" not in last or last.get("shard") not in shards:
        return None
    path, task, began, shard = scene.manifest, scene.task, time.monotonic(), int(last["shard"])
    size = sum(map(len, lines)) + len(lines)
    damage(path, size - len(lines[-1]) - 1, len(lines[-1]) + 1)

    def followed() -> str | None:
        now = scene.lines() if scene.task == task else []
        if any("crc32" in (line := parsed(raw)) and line["shard"] == shard for raw in now[len(lines) - 1 :]):
            return f"published again after {time.monotonic() - began:.1f} s"
        progress = read_json(scene.run.replay_progress(task))
        return "had been read before" if progress.get("released", 0) > shard else None

    return Fault(f"{shown(scene, path)}, line of shard {shard}", followed)


def tear_manifest(scene: Scene) -> Fault | None:
    return damage_manifest(
        scene, lambda path, first, size: os.truncate(path, first + scene.random.randrange(1, size - 1))
    )


def flip_manifest(scene: Scene) -> Fault | None:
    def damage(path: Path, first: int, size: int) -> None:
        flip_bit(path, scene.random, first)

    return damage_manifest(scene, damage)


def damage_checkpoint(scene: Scene, damage: Callable[[Path], str]) -> Fault | None:
    """Damage the newest checkpoint, where there is one before it to fall back to."""
    found = list(scene.run.root.glob(f"tasks/*/checkpoints/{STEP_PREFIX}*"))
    if len(found) < 2:
        return None
    directory = max(found, key=lambda path: (int(path.parent.parent.name), path.name))
    victim = scene.random.choice(sorted(path for path in directory.iterdir() if path.stat().st_size))
    text = f"{shown(scene, victim)}{damage(victim)}"
    name, start, began = shown(scene, directory), scene.job.starts, time.monotonic()

    def followed() -> str | None:
        for later in range(start + 1, scene.job.starts + 1):
            told = [line for line in scene.job.output(later).splitlines() if name in line]
            if told:
                return f"named after {time.monotonic() - began:.1f} s: {told[0].strip()}"
        if scene.job.starts > start + 1 and not directory.exists():
            return "put aside by a start that was ended before it could say so"
        return None

    return Fault(text, followed, must="the damaged checkpoint was never named")


def flip_checkpoint(scene: Scene) -> Fault | None:
    return damage_checkpoint(scene, lambda path: f" in byte {flip_bit(path, scene.random)}")


def truncate_checkpoint(scene: Scene) -> Fault | None:
    return damage_checkpoint(scene, lambda path: f" to {cut(path, scene.random)} bytes")


def full_disk(scene: Scene) -> Fault | None:
    if not scene.limited or scene.ballast_until:
        return None
    seconds = scene.random.uniform(2.0, 6.0)
    scene.ballast_until = time.monotonic() + seconds
    fill_disk(scene.ballast)
    start = scene.job.starts

    def followed() -> str | None:
        if scene.ballast_until:
            return None
        ended = scene.job.code is not None or scene.job.starts != start
        return f"room again after {seconds:.1f} s, " + ("the job had ended" if ended else "the job goes on")

    return Fault(f"{scene.ballast.stat().st_size >> 20} MB of ballast", followed)
