"""Class names and ids: which classes a data set has, and that ids never change once built."""

from __future__ import annotations

from pathlib import Path

from data_tools.sources import Source, open_source
from data_tools.spec import BuildSpec
from trainer.data.shards import read_regular
from trainer.errors import ConfigError

LIST_LIMIT = 1 << 26  # bytes of a class list


class ClassView:
    """A source and the class ids of the data set: positions in the class list, else in the source's own names."""

    def __init__(self, spec: BuildSpec) -> None:
        """Raises UserError where the source, the class list and `classes` do not agree."""
        listed = read_class_list(spec.class_list) if spec.class_list else None
        self.source: Source = open_source(spec.source, spec.source_path, spec.name, listed)
        own = self.source.class_names
        self.names = listed if listed is not None else own
        position = {name: label for label, name in enumerate(own)}
        unknown = [name for name in self.names if name not in position]
        if unknown:
            raise ConfigError(f"data.class_list={spec.class_list}: {unknown[0]!r} is not a class of {spec.source}")
        if spec.classes and spec.classes != len(self.names):
            raise ConfigError(f"data.classes={spec.classes}: there are {len(self.names)} classes")
        self._labels = [position[name] for name in self.names]  # the source's label of each class id

    def samples(self, split: str, classes: list[int]) -> list[tuple[int, int]]:
        """(id, class id) of the wanted classes."""
        ids = {self._labels[class_id]: class_id for class_id in classes}
        return [(id, ids[label]) for id, label in self.source.samples(split, ids.keys())]


def read_class_list(path: str) -> list[str]:
    """One class name per line; a line's number, from 0, is the class id. Empty lines at the end do not count.

    Raises:
        ConfigError: a list that is missing, empty or names a class twice.
    """
    try:
        lines = read_regular(Path(path).expanduser(), LIST_LIMIT).decode().rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_list={path}: unreadable ({error})") from None
    names = [line.strip() for line in lines]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if not names or "" in names or repeated:
        problem = f"{repeated[0]!r} occurs twice" if repeated else "it is empty or has an empty line"
        raise ConfigError(f"data.class_list={path}: {problem}")
    return names


def names_agree(names: list[str], built: list[str]) -> bool:
    """Whether one list continues the other, so that no class id changes its meaning."""
    common = min(len(names), len(built))
    return names[:common] == built[:common]
