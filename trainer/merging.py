"""Settings of files and command lines, put over each other; `trainer.settings` says what they mean together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import AUTO, Config
from trainer.errors import ConfigError, one_line
from trainer.idle import COMMAND_LINE
from trainer.yaml_text import Unreadable, parse_yaml, read_yaml

SECTIONS = asdict(Config())
Setting = tuple[str, Any]  # section.key and its value


@lru_cache(maxsize=1)
def default_settings() -> Any:
    """What everything is merged over; merging leaves it as it is."""
    return OmegaConf.structured(Config)


def read_file(path: Path) -> Iterator[Setting]:
    try:
        content = read_yaml(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from None
    return settings_in({} if content is None else content, str(path))


def settings_in(content: Any, where: str) -> Iterator[Setting]:
    """The settings of a file's sections; an empty section is none."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: holds no sections")
    for section, values in content.items():
        if section not in SECTIONS:
            first = next(iter(values), "") if isinstance(values, dict) else ""
            raise _unknown(f"{section}.{first}".rstrip("."), where)
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{where}: {section} is a section, not a value")
        yield from ((f"{section}.{key}", value) for key, value in (values or {}).items())


def _unknown(name: str, where: str) -> ConfigError:
    known = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
    near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.0)
    return ConfigError(f"{where}: unknown key {one_line(name)}; did you mean {near[0]}?")


def read_dotlist(overrides: Sequence[str]) -> Iterator[Setting]:
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{COMMAND_LINE}: {one_line(repr(override))} is not of the form section.key=value")
        try:
            yield name, parse_yaml(text) if text else ""  # an empty value is an empty string
        except Unreadable as error:
            raise ConfigError(f"{COMMAND_LINE}: {one_line(name)}: not readable as YAML ({error})") from None


def merge_settings(base: Any, settings: Iterable[Setting], where: str) -> Any:
    """Put settings over a configuration, the last of a name winning; nothing in them is resolved."""
    extra: dict[str, dict[str, Any]] = {}
    for name, value in settings:
        section, _, key = name.partition(".")
        if name in SECTIONS:
            raise ConfigError(f"{where}: {name} is a section, not a value")
        if key not in SECTIONS.get(section, {}):
            raise _unknown(name, where)
        problem = _problem(value)
        if problem:
            raise ConfigError(f"{where}: {name}: {problem}")
        extra.setdefault(section, {})[key] = _spelt_out(name, value, where)
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {getattr(error, 'full_key', None) or 'a value'}: {one_line(error)}") from None


def _spelt_out(name: str, value: Any, where: str) -> Any:
    """The one value that has a name in files and a number here."""
    if name != "train.micro_batch":
        return value
    if value == AUTO:
        raise ConfigError(f"{where}: {name}={value}: must not be negative; auto finds what fits")
    return AUTO if value == "auto" else value


def _problem(value: Any) -> str:
    """Why a value cannot be any setting's; empty where it may be one."""
    if isinstance(value, list):
        return next(filter(None, map(_problem, value)), "")
    if isinstance(value, dict):
        return "is a value, not a section"
    if isinstance(value, str) and "${" in value:
        return "${...} is not resolved here: write the value out"
    if isinstance(value, str) and not value.isprintable():
        return f"{one_line(repr(value))} holds characters that do not print"
    return "??? says that it is missing: give a value" if value == "???" else ""


def to_config(merged: Any) -> Config:
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {one_line(error)}") from None


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value
