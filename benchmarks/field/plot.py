"""The answer to each question as a picture, from the content of its result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.report.drawing import plain_log

Content = Mapping[str, Any]
TITLES = {
    "average_accuracy": "average accuracy",
    "fd": "FD",
    "kld": "KLD",
    "memorised": "share of samples that copy the buffer",
}


def plot(content: Content, path: Path) -> None:
    """Written as the ending of `path` says."""
    question = content["question"]["name"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    draw: Callable[[Figure, Content], None] = {"timesteps": _timesteps, "likelihood": _likelihood}.get(question, _rows)
    draw(figure, content)
    figure.suptitle(f"{content['data']}: {content['question']['text']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _rows(figure: Figure, content: Content) -> None:
    """Each measure by row: a dot for each seed, a stroke for the mean."""
    keys = [key for key in TITLES if key in content["rows"][0]["values"]]
    for axes, key in zip(np.ravel(figure.subplots(1, len(keys))), keys, strict=True):
        _row_axes(axes, content["rows"], key)


def _row_axes(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        seen = list(row["values"][key]["by_seed"].values())
        axes.plot(seen, [place] * len(seen), "o", color="C0", markersize=6)
        axes.plot(row["values"][key]["mean"], place, "|", color="black", markersize=22)
    axes.set_yticks(places, [row["row"].replace("_", " ") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    if key in ("fd", "kld") and min(min(row["values"][key]["by_seed"].values()) for row in rows) > 0:
        axes.set_xscale("log")  # they span orders of magnitude
        plain_log(axes.xaxis, *axes.get_xlim())
    axes.set_title(TITLES[key])


def _timesteps(figure: Figure, content: Content) -> None:
    """Growth of the loss of earlier tasks by bin of timesteps, as a factor and as a difference."""
    left, right = figure.subplots(1, 2)
    for row in content["rows"]:
        bins = len(row["loss_grown"])
        centres = (np.arange(bins) + 0.5) / bins
        left.plot(centres, row["loss_grown"], "o-", label=row["row"].replace("_", " "))
        right.plot(centres, row["loss_forgotten"], "o-")
    left.axhline(1.0, color="grey", linewidth=1)
    right.axhline(0.0, color="grey", linewidth=1)
    left.set_yscale("log")
    plain_log(left.yaxis, *left.get_ylim())
    left.set_title("loss of earlier tasks at the end / when learnt")
    right.set_title("the same as a difference")
    for axes in (left, right):
        axes.set_xlabel("t / T: 0 no noise, 1 noise alone")
    left.legend()


def _likelihood(figure: Figure, content: Content) -> None:
    """FD against bits per dimension: a dot for each seed of each row."""
    axes = figure.subplots()
    for number, row in enumerate(content["rows"]):
        values = row["values"]
        bits, distances = (list(values[key]["by_seed"].values()) for key in ("bpd", "fd"))
        axes.plot(bits, distances, "o", color=f"C{number}", label=row["row"].replace("_", " "))
    axes.set_yscale("log")
    plain_log(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("bits per dimension, mean over all tasks: less is better")
    axes.set_ylabel("FD: less is better")
    axes.legend()
