"""How figures of a report look: sizes, colours, heat maps. Dark is bad in every one of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from trainer.report.html import Html
from trainer.report.measures import Measure, Values, digits

ANNOTATED = 12  # more rows or columns than this and a heat map's cells are too small for numbers
DPI = 150
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c564b")  # Okabe and Ito
BEFORE, LEARNT, END, FLOOR = "#888888", "#0072b2", "#d55e00", "#555555"
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")  # 60, not 6 x 10^1; 7.5, not 8


@dataclass(frozen=True)
class Drawn:
    """A figure of a report.

    name: of its file; alt: what those read who do not see it; numbers: the same as a table.
    """

    name: str
    figure: Figure
    alt: str
    caption: str = ""
    numbers: Html = field(default_factory=Html)
    wide: bool = False

    def png(self) -> bytes:
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=DPI)
        return data.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no window knows of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def task_axis(axes: Axes, tasks: int) -> None:
    """Ticks at the tasks, from 1; of many at every fifth."""
    ticks = task_ticks(tasks)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0.6, tasks + 0.4)


def task_ticks(tasks: int) -> list[int]:
    return list(range(1, tasks + 1)) if tasks <= ANNOTATED else [1, *range(5, tasks + 1, 5)]


def colours(count: int) -> list[str]:
    """One for each of `count` lines: those of Okabe and Ito, or steps of viridis where these are too few."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))]


# --- heat maps --------------------------------------------------------------------------------------------------


def colour_map(measure: Measure) -> Colormap:
    """Light to dark red; dark is bad."""
    return matplotlib.colormaps["YlOrRd_r" if measure.higher_is_better else "YlOrRd"]


def colour_norm(measure: Measure, values: Sequence[Values]) -> Normalize:
    """From best to worst: 0 ... 1 for shares, a log scale for ratios, else least to greatest."""
    known = np.concatenate([np.ravel(part) for part in values]) if values else np.zeros(0)
    known = known[np.isfinite(known)]
    if measure.share:
        return Normalize(0.0, 1.0, clip=True)
    if not known.size:
        return Normalize(0.0, 1.0)
    if measure.ratio and (known > 0).any():
        low = max(float(known[known > 0].min()), float(known.max()) * 1e-4)
        return LogNorm(low, max(float(known.max()), 1.5 * low), clip=True)
    low, high = float(known.min()), float(known.max())
    return Normalize(low, high if high > low else low + 1.0)


def heat_map(
    axes: Axes,
    values: Values,
    colours_by: tuple[Colormap, Normalize],
    text: Sequence[Sequence[str]] | None = None,
    *,
    shades: Values | None = None,
) -> None:
    """Cells (rows, columns), empty where NaN, with `text` where they are large enough for it.

    `shades`: what the colours stand for, where that is not the values themselves.
    """
    cmap, norm = colours_by
    shown = values if shades is None else shades
    if isinstance(norm, LogNorm):
        shown = np.where(shown <= 0, norm.vmin or 1.0, shown)
    axes.imshow(np.ma.masked_invalid(shown), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    if text is not None and max(values.shape) <= ANNOTATED:
        size = 8.5 if values.shape[1] <= 6 else 7 if values.shape[1] <= 9 else 5.5
        for i, row in enumerate(text):
            for j, said in enumerate(row):
                if said:
                    shade = float(shown[i, j])
                    colour = cmap(norm(shade)) if np.isfinite(shade) else (1.0, 1.0, 1.0, 1.0)
                    axes.text(j, i, said, ha="center", va="center", fontsize=size, color=_ink(colour))


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever is told apart better (relative luminance as in WCAG 2, section 1.4.3)."""
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def colour_bar(figure: Figure, axes: Axes | Sequence[Axes], *, percent: bool = False) -> None:
    """The scale of heat maps, which they share, beside them; with plain numbers."""
    image = (axes if isinstance(axes, Axes) else axes[0]).get_images()[0]
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, fraction=0.05)  # pyright: ignore[reportArgumentType]
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if isinstance(image.norm, LogNorm):
        plain_log(bar.ax.yaxis, float(image.norm.vmin or 1.0), float(image.norm.vmax or 1.0))
    elif percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def plain_log(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at a log scale from `low` to `high`, as many as fit."""
    span = high / low
    axis.set_major_locator(MaxNLocator(4) if span < 5 else LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def cell_texts(values: Values, measure: Measure) -> list[list[str]]:
    """What stands in the cells: shares in percent."""
    if measure.share:
        return [[f"{100 * value:.0f}" if np.isfinite(value) else "" for value in row] for row in values]
    return [[digits(float(value)) for value in row] for row in values]


def matrix_panel(
    axes: Axes,
    matrix: Values,
    measure: Measure,
    norm: Normalize,
    *,
    floor: Values | None = None,
    shades: Values | None = None,
) -> None:
    """A matrix (T, T), row i after learning task i; `floor` (T,) as a row of its own below."""
    tasks = len(matrix)
    texts = cell_texts(matrix, measure)
    for i, j in zip(*np.tril_indices(tasks), strict=True):
        if not np.isfinite(matrix[i, j]):  # learnt, but not measured: nothing was generated of it
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="0.9", edgecolor="0.7", hatch="//"))
    shown, rows = matrix, [str(task) for task in range(1, tasks + 1)]
    if floor is not None:
        shown = np.concatenate([matrix, floor[None]])
        shades = None if shades is None else np.concatenate([shades, floor[None]])
        texts = [*texts, *cell_texts(floor[None], measure)]
        axes.axhline(tasks - 0.5, color="white", linewidth=7)
    heat_map(axes, shown, (colour_map(measure), norm), texts, shades=shades)
    ticks = task_ticks(tasks)
    axes.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    places, names = [tick - 1 for tick in ticks], [rows[tick - 1] for tick in ticks]
    if floor is not None:
        places, names = [*places, tasks], [*names, "floor"]
    axes.set_yticks(places, names)
    axes.set_title(measure.title + (", %" if measure.share else ""), fontsize=10, loc="left")
    axes.set_xlabel("task", fontsize=9)
    axes.set_ylabel("after learning task", fontsize=9)
