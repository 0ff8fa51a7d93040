"""What to build: the part of a configuration that says what the shards of a data set hold."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from trainer.data.shards import DATASET_NAME, SCHEMA_VERSION, read_card
from trainer.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
DATA_DIR = Path("data")
# Two builds that differ in one of these make different bytes, so they never share a root. Not here: `tasks`, `classes`
# and the class list, which may grow and are compared by their own rules; and `source_path`, which says where the raw
# images lie on one machine, while `name` says which they are.
IDENTITY = ("name", "source", "image_size", "channels", "shard_size", "format")
YOUNGER: dict[str, object] = {"small_images": "pad"}  # the same for keys that older data sets do not have


@dataclass(frozen=True)
class BuildSpec:
    """The fields have the names and meanings of `DataConfig`.

    `classes` is the expected number of classes, 0 for whatever the source holds. `source_path` may be left empty where
    nothing has to be built any more.
    """

    name: str
    source: str
    tasks: list[list[int]]
    image_size: int
    channels: int
    source_path: str = ""
    class_list: str = ""
    classes: int = 0
    shard_size: int = 1000
    format: str = "png"
    small_images: str = "pad"

    def identity(self) -> dict[str, object]:
        """What is kept beside the shards to recognise the data set again; a younger key only where it is not as it
        was before there was the key."""
        younger = {key: value for key, before in YOUNGER.items() if (value := getattr(self, key)) != before}
        return {**{key: getattr(self, key) for key in IDENTITY}, **younger}


@dataclass(frozen=True)
class Difference:
    """One key in which a spec and a built data set disagree."""

    key: str
    built: object
    wanted: object

    def __str__(self) -> str:
        return f"data.{self.key} (built with {self.built!r}, wanted {self.wanted!r})"


def check_spec(spec: BuildSpec) -> None:
    """Raises ConfigError, naming the key, for values that no data set can be built with."""
    if not NAME_PATTERN.fullmatch(spec.name):
        raise ConfigError(f"data.name={spec.name!r}: may hold letters, digits, '_', '.' and '-' only")
    if spec.channels not in (1, 3):
        raise ConfigError(f"data.channels={spec.channels}: must be 1 or 3")
    if spec.format not in ("png", "raw"):
        raise ConfigError(f"data.format={spec.format}: must be png or raw")
    if spec.small_images not in ("pad", "enlarge"):
        raise ConfigError(f"data.small_images={spec.small_images}: must be pad or enlarge")
    for key in ("image_size", "shard_size"):
        if getattr(spec, key) < 1:
            raise ConfigError(f"data.{key}={getattr(spec, key)}: must be above 0")
    if not spec.tasks:
        raise ConfigError("data.tasks: there is no task to build")


def differences(spec: BuildSpec, built: dict[str, object]) -> list[Difference]:
    """Where a spec is not the one a data set was built with."""
    wanted, before = {**YOUNGER, **spec.identity()}, {**YOUNGER, **built}
    return [Difference(key, before.get(key), value) for key, value in wanted.items() if before.get(key) != value]


def tasks_agree(wanted: list[list[int]], built: list[list[int]]) -> bool:
    """Whether one list of tasks continues the other."""
    common = min(len(wanted), len(built))
    return wanted[:common] == built[:common]


def default_root(name: str, spec: BuildSpec) -> Path:
    """`data/<name>-<size>-<8 hex>`: where a data set lies when the configuration names no root.

    The hash covers the identity of the spec, the paths of raw images and class list as written, and the first task; not
    the later tasks, so that a task appended finds the same root. Another split with the same first task finds that root
    occupied by tasks it does not continue, and goes to `...-2`, `...-3`.
    """
    paths = {"source_path": spec.source_path, "class_list": spec.class_list}
    parts = {**spec.identity(), **paths, "first_task": spec.tasks[:1], "schema": SCHEMA_VERSION}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    base = root = DATA_DIR / f"{name}-{spec.image_size}-{digest}"
    number = 1
    while (root / DATASET_NAME).is_file() and not tasks_agree(spec.tasks, read_card(root).tasks):
        number += 1
        root = base.with_name(f"{base.name}-{number}")
    return root
