"""What a report is made of: the files of a run directory, read once. No model, no GPU, no data set is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.config import Config
from trainer.errors import ConfigError, UserError
from trainer.run import RunDir
from trainer.settings import as_plain, restore_config
from trainer.tracking.log import read_log

DIGEST = "metrics-sha256"  # the name under which a page keeps what it was made of
HEAD = 4096  # bytes of a page within which that stands


@dataclass(frozen=True)
class Source:
    """A finished run. What an older version did not write yet is empty."""

    run: RunDir
    result: Mapping[str, Any]  # metrics.json
    digest: str  # of metrics.json, as `metrics_digest` gives it
    config: Mapping[str, Mapping[str, Any]]  # config.yaml, by section
    log: tuple[Mapping[str, Any], ...]  # the "train" lines of metrics.jsonl, in order of task and seen images
    class_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.setting("run", "name") or self.run.root.name)

    @property
    def tasks(self) -> int:
        return len(self.result["after_task"])

    @property
    def task_classes(self) -> list[list[int]]:
        """Class ids of each task; [] where the configuration does not tell."""
        tasks = self.setting("data", "tasks")
        return tasks if isinstance(tasks, list) and len(tasks) == self.tasks else []

    def setting(self, section: str, key: str) -> Any:
        """The value of `section.key`; its default where the file does not have it."""
        held = self.config.get(section)
        default = _DEFAULTS.get(section, {}).get(key)
        return held.get(key, default) if isinstance(held, Mapping) else default

    def changed_settings(self) -> list[tuple[str, Any, Any]]:
        """(section.key, value, default) of what is not as it is by default."""
        return [
            (f"{section}.{key}", value, _DEFAULTS.get(section, {}).get(key))
            for section, values in self.config.items()
            if isinstance(values, Mapping)
            for key, value in values.items()
            if section not in _DEFAULTS or key not in _DEFAULTS[section] or value != _DEFAULTS[section][key]
        ]


_DEFAULTS: dict[str, dict[str, Any]] = as_plain(Config())


def open_source(run: RunDir) -> Source:
    """Read a finished run.

    Raises:
        UserError: it has no complete metrics.json.
    """
    try:
        content = run.metrics.read_bytes()
        result = json.loads(content)
    except (OSError, ValueError):
        raise UserError(f"{run.metrics}: not there or not JSON; a report is made of a finished run") from None
    whole = isinstance(result, dict) and isinstance(result.get("after_task"), list) and result["after_task"]
    if not whole or not isinstance(result.get("matrix"), dict) or not isinstance(result.get("final"), dict):
        raise UserError(f"{run.metrics}: lacks matrix, after_task or final; a report is made of a finished run")
    return Source(
        run=run,
        result=result,
        digest=metrics_digest(content),
        config=_config(run),
        log=tuple(train_lines(run)),
        class_names=tuple(_class_names(run, len(result["after_task"]))),
    )


def metrics_digest(content: bytes) -> str:
    """By which a report knows the metrics.json that it was made of."""
    return hashlib.sha256(content).hexdigest()


def is_current(run: RunDir) -> bool:
    """Whether the run's report was made of the metrics.json that is there."""
    try:
        digest = metrics_digest(run.metrics.read_bytes())
        with run.report_page.open("rb") as file:
            return digest.encode() in file.read(HEAD)
    except OSError:
        return False


def train_lines(run: RunDir) -> list[dict[str, Any]]:
    """The "train" lines of metrics.jsonl: what a resumed run logged again counts once, as it was logged last."""
    if not run.metrics_log.exists():
        return []
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for line in read_log(run.metrics_log):
        task, seen = line.get("task"), line.get("seen")
        if line.get("event") == "train" and isinstance(task, int) and isinstance(seen, int):
            found[task, seen] = line
    return [found[place] for place in sorted(found)]


def _config(run: RunDir) -> Mapping[str, Mapping[str, Any]]:
    try:
        return restore_config(run.config)
    except ConfigError:
        return {}


def config_text(source: Source) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True)


def _class_names(run: RunDir, tasks: int) -> list[str]:
    """By class id, from the card of the newest teacher."""
    try:
        card = json.loads((run.teacher(tasks) / "card.json").read_bytes())
        names = card["class_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
