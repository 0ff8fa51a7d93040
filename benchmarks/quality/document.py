"""The tables of docs/replay.md, from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catalogue import line, with_table

from quality.variants import DATA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "replay.md"
HEAD = (
    "variant",
    "settings",
    "forwards / point",
    "seeds",
    "FD (min..max)",
    "FD / inline",
    "KLD",
    "KLD - inline",
    "FD / default",
)


def with_tables(text: str, results: Path) -> str:
    """The page with the table of each data set that was measured. Raises ValueError where its markers are missing."""
    for data in DATA:
        path = results / f"replay_quality_{data}.json"
        if path.exists():
            text = with_table(text, table(json.loads(path.read_text())), data)
    return text


def table(content: Mapping[str, Any]) -> str:
    """Markdown: the command, and a row for each variant."""
    lines = ["", f"    {content['command']}", "", line(HEAD), line(["---", "---", *["---:"] * (len(HEAD) - 2)])]
    return "\n".join([*lines, *(line(_cells(row)) for row in content["rows"])]) + "\n\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    name, *rest = row_text(row, ratio="{:.2f}", kld="{:.3f}")
    over = interval_text(row.get("fd_over_default"), "{:.2f}")
    return [name, ", ".join(f"`{setting}`" for setting in row["settings"]), *rest, over]


def row_text(row: Mapping[str, Any], *, ratio: str, kld: str) -> list[str]:
    """A row as people read it: variant, forwards, seeds, FD, its ratio, KLD, its difference; in forms of numbers."""
    spread = row["spread"]["fd"]
    return [
        row["variant"],
        f"{row['teacher_forwards_per_point']:.2f}",
        str(len(row["seeds"])),
        f"{row['fd']:.2f} ({spread['min']:.2f}..{spread['max']:.2f})",
        interval_text(row.get("fd_ratio"), ratio),
        kld.format(row["kld"]),
        interval_text(row.get("kld_difference"), kld.replace(":", ":+")),
    ]


def interval_text(found: Mapping[str, float | None] | None, form: str) -> str:
    """A mean and its interval; a dash for nothing."""
    if found is None:
        return "-"
    mean = form.format(found["mean"])
    return mean if found["low"] is None else f"{mean} ({form.format(found['low'])}..{form.format(found['high'])})"
