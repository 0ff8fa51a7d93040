"""Pictures of samples: by class after each task, and over the tasks, where forgetting can be seen."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.data.shards import write_atomic

CELL = 48  # least pixels of a sample: small ones are enlarged by a whole factor, pixel by pixel
GAP, MARGIN, TASK_GAP = 2, 14, 8
FONT_SIZE, TITLE_SIZE = 13, 15
ROWS_PER_BLOCK = 20  # more classes than this stand in several blocks beside each other
HISTORY_COLUMNS = 30
INK, FAINT, PAPER, WRONG = (30, 30, 30), (130, 130, 130), (255, 255, 255), (214, 39, 40)
EMPTY = (240, 240, 240)
TASK_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (140, 86, 75), (23, 190, 207))


@dataclass(frozen=True)
class ClassSamples:
    """A few samples of each class, K classes in the order of learning, up to n each.

    images: (K, n, C, H, W) uint8; count: (K,) how many of the n are there; predicted: (K, n) class ids, -1 where empty.
    `asked`: whether a row's class was asked for; if not, the samples were predicted to be of it.
    """

    classes: tuple[int, ...]
    images: NDArray[np.uint8]
    count: NDArray[np.int64]
    predicted: NDArray[np.int64]
    asked: bool


def pick_samples(
    images: NDArray[np.uint8],
    asked: NDArray[np.int64] | None,
    predicted: NDArray[np.int64],
    classes: Sequence[int],
    per_class: int,
) -> ClassSamples:
    """The first `per_class` samples of each class, of images (N, C, H, W): as asked for, else as predicted."""
    by = predicted if asked is None else asked
    chosen = np.zeros((len(classes), per_class, *images.shape[1:]), dtype=np.uint8)
    names = np.full((len(classes), per_class), -1, dtype=np.int64)
    count = np.zeros(len(classes), dtype=np.int64)
    for row, label in enumerate(classes):
        own = np.flatnonzero(by == label)[:per_class]
        count[row] = len(own)
        chosen[row, : len(own)], names[row, : len(own)] = images[own], predicted[own]
    return ClassSamples(tuple(classes), chosen, count, names, asked is not None)


def save_samples(path: Path, samples: ClassSamples) -> None:
    """Keep picked samples (npz, nothing pickled), for the picture over all tasks."""
    data = io.BytesIO()
    np.savez_compressed(
        data,
        classes=np.asarray(samples.classes, dtype=np.int64),
        images=samples.images,
        count=samples.count,
        predicted=samples.predicted,
        asked=np.asarray(samples.asked),
    )
    write_atomic(path, data.getvalue())


def load_samples(path: Path) -> ClassSamples:
    """What `save_samples` kept."""
    with np.load(path, allow_pickle=False) as arrays:
        classes = tuple(int(label) for label in arrays["classes"])
        return ClassSamples(classes, arrays["images"], arrays["count"], arrays["predicted"], bool(arrays["asked"]))


def sample_grid(samples: ClassSamples, tasks: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Image.Image:
    """One row per class with its name, a coloured bar per task; samples judged to be of another class are framed red.

    Args:
        tasks: class ids of each task, from task 1; those not among the samples are left out.
        names: class names by class id.
    """
    shown = [[label for label in task if label in samples.classes] for task in tasks]
    rows = [(number, label) for number, task in enumerate(shown, 1) for label in task]
    blocks = [rows[start : start + _block_rows(len(rows))] for start in range(0, len(rows), _block_rows(len(rows)))]
    font, bold = _font(FONT_SIZE), _font(TITLE_SIZE, bold=True)
    label_width = 58 + max(math.ceil(font.getlength(_short(names[label]))) for _, label in rows)
    factor = _factor(samples.images.shape[-1])
    cell = samples.images.shape[-1] * factor + GAP
    block_width = label_width + samples.images.shape[1] * cell
    heights = [len(block) * cell + TASK_GAP * (len({task for task, _ in block}) - 1) for block in blocks]
    note = _note(samples)
    text_width = math.ceil(max(bold.getlength(title), font.getlength(note)))
    width = 2 * MARGIN + max(len(blocks) * block_width + (len(blocks) - 1) * 2 * MARGIN, text_width)
    top = MARGIN + 48
    canvas = Image.new("RGB", (width, top + max(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 2), title, INK, bold)
    draw.text((MARGIN, MARGIN + 20), note, FAINT, font)
    for number, block in enumerate(blocks):
        left = MARGIN + number * (block_width + 2 * MARGIN)
        _draw_block(canvas, samples, block, names, (left, top), label_width, factor)
    return canvas


def history_grid(
    steps: Sequence[ClassSamples],
    tasks: Sequence[Sequence[int]],
    names: Sequence[str],
    title: str,
    real: ClassSamples | None = None,
) -> Image.Image:
    """One row of samples after each task; the same class below itself, so that forgetting shows going down a column.

    Args:
        steps: picked samples after task 1, 2, ...
        real: real images, as the first row.
    """
    columns = _history_columns(tasks[: len(steps)], steps[-1].images.shape[1])
    factor = _factor(steps[-1].images.shape[-1])
    cell = steps[-1].images.shape[-1] * factor + GAP
    font, bold = _font(FONT_SIZE), _font(TITLE_SIZE, bold=True)
    lines = ([("real images", real)] if real else []) + [(f"after task {i}", step) for i, step in enumerate(steps, 1)]
    left, top = MARGIN + 100, MARGIN + 26 + 56
    lefts = _column_lefts(columns, left, cell)
    width = max(lefts[-1] + cell + MARGIN, math.ceil(bold.getlength(title)) + 2 * MARGIN)
    canvas = Image.new("RGB", (width, top + len(lines) * (cell + 4) + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 2), title, INK, bold)
    _draw_heads(draw, columns, lefts, cell, top, names)
    for row, (text, samples) in enumerate(lines):
        y = top + row * (cell + 4)
        draw.text((left - 10, y + cell // 2), text, INK, font, anchor="rm")
        for (task, label, nth), x in zip(columns, lefts, strict=True):
            learnt = samples is real or task <= row + (0 if real else 1)
            _paste(canvas, samples, label, nth, (x, y), factor, framed=False, mark_missing=learnt)
    return canvas


def save_png(path: Path, image: Image.Image) -> None:
    """Atomically."""
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    write_atomic(path, data.getvalue())


def _draw_block(
    canvas: Image.Image,
    samples: ClassSamples,
    block: Sequence[tuple[int, int]],
    names: Sequence[str],
    corner: tuple[int, int],
    label_width: int,
    factor: int,
) -> None:
    """Rows of (task, class id) from `corner` on."""
    draw, font = ImageDraw.Draw(canvas), _font(FONT_SIZE)
    cell = samples.images.shape[-1] * factor + GAP
    left, y = corner
    for position, (task, label) in enumerate(block):
        first = position == 0 or block[position - 1][0] != task
        if first and position:
            y += TASK_GAP
        if first:
            rows = sum(1 for other, _ in block if other == task)
            draw.rectangle((left, y, left + 4, y + rows * cell - GAP - 1), _colour(task))
            draw.text((left + 10, y + rows * cell // 2), f"task {task}", _colour(task), font, anchor="lm")
        x = left + label_width
        draw.text((x - 8, y + cell // 2), _short(names[label]), INK, font, anchor="rm")
        for nth in range(samples.images.shape[1]):
            _paste(canvas, samples, label, nth, (x + nth * cell, y), factor, framed=samples.asked, mark_missing=True)
        y += cell


def _draw_heads(
    draw: ImageDraw.ImageDraw,
    columns: Sequence[tuple[int, int, int]],
    lefts: Sequence[int],
    cell: int,
    top: int,
    names: Sequence[str],
) -> None:
    """Task bars and class names above the columns (task, class id, nth)."""
    font = _font(FONT_SIZE)
    for task in sorted({task for task, _, _ in columns}):
        own = [x for (number, _, _), x in zip(columns, lefts, strict=True) if number == task]
        draw.text(((own[0] + own[-1] + cell - GAP) // 2, top - 44), f"task {task}", _colour(task), font, anchor="mm")
        draw.rectangle((own[0], top - 34, own[-1] + cell - GAP - 1, top - 31), _colour(task))
    for label in {label for _, label, _ in columns}:
        own = [x for (_, other, _), x in zip(columns, lefts, strict=True) if other == label]
        space = own[-1] + cell - GAP - own[0]
        text = _fitting(names[label], font, space)
        draw.text(((2 * own[0] + space) // 2, top - 15), text, INK, font, anchor="mm")


def _paste(
    canvas: Image.Image,
    samples: ClassSamples | None,
    label: int,
    nth: int,
    corner: tuple[int, int],
    factor: int,
    *,
    framed: bool,
    mark_missing: bool,
) -> None:
    """One sample; a grey field where there should be one and is none; a red frame around one of another class."""
    if samples is None or not mark_missing:
        return
    size = samples.images.shape[-1] * factor
    x, y = corner
    box = (x, y, x + size - 1, y + size - 1)
    draw = ImageDraw.Draw(canvas)
    row = samples.classes.index(label) if label in samples.classes else -1
    if row < 0 or nth >= samples.count[row]:
        draw.rectangle(box, EMPTY)
        draw.line((x, y, x + size - 1, y + size - 1), (205, 205, 205))
        return
    canvas.paste(_enlarge(samples.images[row, nth], factor), corner)
    if framed and samples.predicted[row, nth] != label:
        draw.rectangle(box, outline=WRONG, width=2)


def _enlarge(image: NDArray[np.uint8], factor: int) -> Image.Image:
    """(C, H, W) -> RGB, each pixel a square of `factor` pixels."""
    colour = np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image
    large = colour.repeat(factor, axis=1).repeat(factor, axis=2)
    return Image.fromarray(np.ascontiguousarray(large.transpose(1, 2, 0)))


def _history_columns(tasks: Sequence[Sequence[int]], per_class: int) -> list[tuple[int, int, int]]:
    """(task, class id, nth sample) of each column, HISTORY_COLUMNS at most where there are fewer tasks than that."""
    share = max(1, HISTORY_COLUMNS // len(tasks))
    columns = []
    for number, task in enumerate(tasks, 1):
        each = max(1, min(per_class, 4, share // len(task)))
        columns += [(number, label, nth) for label in task[:share] for nth in range(each)]
    return columns


def _column_lefts(columns: Sequence[tuple[int, int, int]], left: int, cell: int) -> list[int]:
    lefts: list[int] = []
    for position, (task, _, _) in enumerate(columns):
        if position:
            left += cell + (TASK_GAP if columns[position - 1][0] != task else 0)
        lefts.append(left)
    return lefts


def _note(samples: ClassSamples) -> str:
    if not samples.asked:
        return "unconditional: samples stand with the class that the classifier sees in them"
    there = np.arange(samples.predicted.shape[1]) < samples.count[:, None]
    wrong = int(((samples.predicted != np.asarray(samples.classes)[:, None]) & there).sum())
    return f"rows: class asked for; red: the classifier sees another class ({wrong} of {int(there.sum())})"


def _block_rows(rows: int) -> int:
    """Rows of each block, so that blocks are about equally long."""
    return math.ceil(rows / math.ceil(rows / ROWS_PER_BLOCK))


def _factor(size: int) -> int:
    return max(1, math.ceil(CELL / size))


def _colour(task: int) -> tuple[int, int, int]:
    return TASK_COLOURS[(task - 1) % len(TASK_COLOURS)]


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _fitting(name: str, font: ImageFont.FreeTypeFont, space: int) -> str:
    """As much of a name as fits into `space` pixels."""
    if font.getlength(name) <= space:
        return name
    while name and font.getlength(name + "…") > space:
        name = name[:-1]
    return name + "…" if name else ""


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: there on every machine, with letters for most languages."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
