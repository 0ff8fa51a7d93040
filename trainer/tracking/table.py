"""The tables at the end of a run: after each task, each measure beside its floor, then forgetting and cost."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.tracking.progress import duration

MAX_WIDTH, MIN_WIDTH = 120, 80
FIXED_WIDTH = 38  # of the columns that stand in every table
TASK_WIDTH = 8  # of a task's column
MISSING = "--"
MEANING_WIDTH = 100  # from which there is room to say what a measure means
BY_FEATURES = (  # name, key, digits, meaning; see trainer.evaluation.neighbours for the definitions
    ("FD", "fd", 1, "features' distance; 0 is best"),
    ("precision", "precision", 3, "samples amid real images"),
    ("recall", "recall", 3, "real images amid samples"),
    ("density", "density", 3, "how deep amid them; 1 as real"),
    ("coverage", "coverage", 3, "real images with samples near"),
    ("KLD", "kld", 3, "mix of classes; 0 is best"),
)


class Level(NamedTuple):
    """The accuracy of a probe at one level of noise."""

    timestep: int
    accuracy: float


def result_table(result: Mapping[str, Any], width: int = 100, *, plain: bool = False) -> Table:
    """Rows: after each task; columns: FD, KLD, accuracy over the classes seen, then the FD of single tasks.

    Where the tasks do not fit into `width` characters, the first, the worst and the newest stand for them.
    """
    matrix = result["matrix"]["fd"]
    tasks = len(matrix)
    every = tasks <= (width - FIXED_WIDTH) // TASK_WIDTH
    table = Table(box=box.ASCII2 if plain else box.ROUNDED)
    table.add_column("after", no_wrap=True)
    asked = any(after["accuracy"] is not None for after in result["after_task"])  # not of an unconditional model
    for name in ("FD", "KLD", "accuracy") if asked else ("FD", "KLD"):
        table.add_column(name, justify="right", no_wrap=True, style="bold")
    names = [f"FD t{task}" for task in range(1, tasks + 1)] if every else ["FD first", "FD worst", "FD newest"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for number, (after, row) in enumerate(zip(result["after_task"], matrix, strict=True), 1):
        cells = [f"task {number}", number_text(after["fd"]), number_text(after["kld"], 3)]
        cells += [percent_text(after["accuracy"])] if asked else []
        table.add_row(*cells, *(_task_cells(row[:number]) if every else _short_cells(row[:number])))
    return table


def measures_table(result: Mapping[str, Any], width: int = 100, *, plain: bool = False) -> Table | None:
    """Each measure at the end, over all classes, beside its floor: what as many real images get in place of samples.

    None for a result from before there were floors.
    """
    final = result["final"]
    if "floor" not in final:
        return None
    table = Table(box=box.ASCII2 if plain else box.ROUNDED)
    table.add_column("at the end", no_wrap=True)
    for name in ("value", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("images", no_wrap=True)
    explained = width >= MEANING_WIDTH
    if explained:
        table.add_column("meaning")
    for row in [*_sample_rows(final), *_real_rows(final), *_memorisation_rows(final)]:
        table.add_row(*(row if explained else row[:-1]))
    return table


def _sample_rows(final: Mapping[str, Any]) -> list[tuple[str, ...]]:
    floor, images = final["floor"], f"{final['samples']:,} against {final['real_images']:,}"
    rows = [
        (name, number_text(final[key], digits), number_text(floor[key], digits), images, meaning)
        for name, key, digits, meaning in BY_FEATURES
    ]
    if final["accuracy"] is not None:
        values = percent_text(final["accuracy"]), percent_text(floor["accuracy"])
        rows.append(("accuracy", *values, f"{final['samples']:,}", "of the class asked for"))
    return rows


def _real_rows(final: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What the model, and the classifier that learns beside it, make of test images: no second set compares."""
    rows: list[tuple[str, ...]] = []
    if "loss" in final:
        grown = f"grown by {number_text(final['forgetting_loss'], 4)} since learnt"
        rows.append(("loss", number_text(final["loss"], 4), "", f"{final['loss_images']:,} images", grown))
    if "bpd" in final:
        error = f"bound; +- {number_text(final['bpd_standard_error'], 3)} over images"
        rows.append(("bits/dim", number_text(final["bpd"], 3), "", f"{final['bpd_images']:,} images", error))
    if "classifier_accuracy" in final:
        lost = f"continual classifier; {percent_text(final['forgetting_classifier_accuracy'])} forgotten"
        rows.append(
            (
                "classifier",
                percent_text(final["classifier_accuracy"]),
                "",
                f"{final['classifier_images']:,} images",
                lost,
            )
        )
    return rows + _own_classifier_rows(final) + _probe_rows(final)


def _own_classifier_rows(final: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of the classifier that is a part of the model."""
    if "model_accuracy" not in final:
        return []
    lost = f"own classifier; {percent_text(final['forgetting_model_accuracy'])} forgotten"
    return [
        ("model accuracy", percent_text(final["model_accuracy"]), "", f"{final['model_images']:,} images", lost),
        ("average accuracy", percent_text(final["average_accuracy"]), "", "", "mean over tasks"),
        ("backward transfer", percent_text(final["backward_transfer"]), "", "", "since learnt; below 0: forgotten"),
    ]


def _probe_rows(final: Mapping[str, Any]) -> list[tuple[str, ...]]:
    probe = final.get("probe") or {}
    found = [(name, best_level(final, kind)) for name, kind in (("linear probe", "linear"), ("k-NN probe", "knn"))]
    return [
        (
            name,
            percent_text(best.accuracy),
            "",
            f"{probe['test_images']:,} images",
            f"of features; best of {len(probe['timesteps'])} levels: t = {best.timestep}",
        )
        for name, best in found
        if best is not None
    ]


def best_level(row: Mapping[str, Any], kind: str) -> Level | None:
    """Where a probe ("linear", "knn") of a row is right most often, the lowest of equal ones; None without one."""
    probe = row.get("probe") or {}
    levels = zip(probe.get("timesteps", []), probe.get(kind, []), strict=True)
    known = [Level(timestep, accuracy) for timestep, accuracy in levels if accuracy is not None]
    return max(known, key=lambda level: level.accuracy, default=None)


def _memorisation_rows(final: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"memorised, {name}",
            percent_text(found["features"]["memorised"]),
            percent_text(found["features"]["held_out_memorised"]),
            f"{found['samples']:,} against {found['learnt_images']:,}",
            "nearer to one than real ones are",
        )
        for name, found in final.get("nearest", {}).items()
    ]


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Forgetting and cost, one line each."""
    final, cost = result["final"], result["cost"]
    measured = f"FD forgetting {number_text(final['forgetting'])}"
    if final["forgetting_accuracy"] is not None:
        measured += f"   accuracy forgetting {percent_text(final['forgetting_accuracy'])}"
    if final["lost_tasks"]:
        measured += f"   nothing generated of task {', '.join(map(str, final['lost_tasks']))}"
    wall = f"wall time {duration(cost['wall_seconds'])}   " if "wall_seconds" in cost else ""
    return [
        measured,
        f"teacher evaluations {cost['teacher_evaluations']:,}   replay points used {cost['replay_points_used']:,}",
        f"{wall}training {duration(cost['train_seconds'])}   {cost['images_per_second']:,.0f} images/s   "
        f"starved {cost['starved_seconds']:.1f} s",
    ]


def result_view(
    result: Mapping[str, Any], paths: Mapping[str, Path] | None = None, width: int = 100, *, plain: bool = False
) -> RenderableType:
    """Tables, forgetting, cost, and where the pictures are (`paths` by what they show)."""
    lines: list[RenderableType] = [Text(_title(result), style="bold"), result_table(result, width, plain=plain)]
    measures = measures_table(result, width, plain=plain)
    lines += [] if measures is None else [measures]
    lines += [Text(line) for line in summary_lines(result)]
    if paths:
        longest = max(map(len, paths))
        lines += [Text(f"{name:<{longest}}  {path}", overflow="fold") for name, path in paths.items()]
    return Group(*lines)


def print_result(
    result: Mapping[str, Any], paths: Mapping[str, Path] | None = None, console: Console | None = None
) -> None:
    """To a terminal, or as plain text where standard output is none."""
    console = console or Console()
    if not console.is_terminal:
        console.file.write(plain_result(result, paths))
        console.file.flush()
        return
    width = min(console.width, MAX_WIDTH)
    console.print(result_view(result, paths, width))


def plain_result(result: Mapping[str, Any], paths: Mapping[str, Path] | None = None, width: int = 100) -> str:
    """The same in ASCII, for logs; ends with a line end."""
    text = io.StringIO()
    console = Console(file=text, width=max(MIN_WIDTH, width), no_color=True, force_terminal=False, highlight=False)
    console.print(result_view(result, paths, width, plain=True), soft_wrap=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def number_text(value: float | None, digits: int = 1) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def percent_text(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _title(result: Mapping[str, Any]) -> str:
    seed = f", seed {result['seed']}" if "seed" in result else ""
    last = result["after_task"][-1]
    return f"{result['method']}{seed}: {last['samples']:,} samples against {last['fd_reference']} images"


def _task_cells(learnt: Sequence[float | None]) -> list[str]:
    """FD of every task; columns of tasks not learnt yet stay empty."""
    return [number_text(value) for value in learnt]


def _short_cells(learnt: Sequence[float | None]) -> list[str]:
    present = [value for value in learnt if value is not None]
    return [number_text(learnt[0]), number_text(max(present) if present else None), number_text(learnt[-1])]
