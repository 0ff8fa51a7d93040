"""The probes of a model's features by level of noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from trainer.report.drawing import LEARNT, Drawn, new_figure, tidy
from trainer.report.html import folded, table
from trainer.report.measures import BY_KEY, as_array, digits

PROBES = (("linear", "linear probe"), ("knn", "k-NN probe"))
NAMED = 8  # more tasks than this and only the first and the last have a line in the legend
FAINTEST, FAINT = 0.15, 0.6  # opacity of the first task's line, and of the last but one's
Result = Mapping[str, Any]


def probe_figure(result: Result) -> Drawn | None:
    """Accuracy of each probe by timestep, the last task's line full, earlier ones fainter; None where none was made."""
    rows = [(after, row["probe"]) for after, row in enumerate(result["after_task"], 1) if row.get("probe")]
    if not rows:
        return None
    figure = new_figure(9.2, 3.3)
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), PROBES, strict=True):
        _lines(axes, rows, kind)
        tidy(axes, title, "timestep", "accuracy, %" if kind == "linear" else "")
        axes.set_ylim(0.0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    last = rows[-1][1]
    caption = (
        f"On test images of all classes seen, noised to each timestep; 0 is the least noise. After the last task the "
        f"probes learnt from {last['images']:,} training images and were asked about {last['test_images']:,} test "
        f"images; {last['neighbours']} neighbours vote. With each task there are more classes to tell apart."
    )
    header = ["probe, after task", *(f"t = {timestep}" for timestep in last["timesteps"])]
    lines = [
        [f"{title}, {after}", *(digits(float(value), BY_KEY["model_accuracy"]) for value in as_array(probe[kind]))]
        for kind, title in PROBES
        for after, probe in rows
    ]
    return Drawn(
        "probes",
        figure,
        alt="Curves of the accuracy of a linear and of a nearest-neighbour probe by timestep, one after each task",
        caption=caption,
        numbers=folded("as numbers", table(header, lines)),
        wide=True,
    )


def _lines(axes: Axes, rows: list[tuple[int, Mapping[str, Any]]], kind: str) -> None:
    faint = np.linspace(FAINTEST, FAINT, len(rows) - 1) if len(rows) > 1 else []
    for (after, probe), opacity in zip(rows, [*faint, 1.0], strict=True):
        last, told = after == rows[-1][0], len(rows) <= NAMED or after in (rows[0][0], rows[-1][0])
        axes.plot(
            *(probe["timesteps"], as_array(probe[kind]), "o-"),
            color=LEARNT,
            alpha=float(opacity),
            linewidth=2.2 if last else 1.3,
            markersize=5 if last else 3,
            label=f"after task {after}" if told else None,
        )
