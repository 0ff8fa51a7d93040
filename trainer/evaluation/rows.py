"""Rows: what was measured after a task, as one JSON object with an entry for each task learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(*rows: Mapping[str, Any]) -> dict[str, Any]:
    """One row of several about the same tasks, their entries of `tasks` joined task by task."""
    row: dict[str, Any] = {}
    for part in rows:
        row |= part
    row["tasks"] = [
        {key: value for entry in entries for key, value in entry.items()}
        for entries in zip(*(part["tasks"] for part in rows), strict=True)
    ]
    return row
