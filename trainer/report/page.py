"""The page of one run: `report/index.html` and its figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.shards import write_atomic
from trainer.report.drawing import DPI, Drawn
from trainer.report.figures import course_figures, forgetting_figure, matrix_figures, memorisation_figure
from trainer.report.history import history_png
from trainer.report.html import Html, element, folded, join, link, page, paragraph, picture, relative, section, text
from trainer.report.representation import probe_figure
from trainer.report.source import DIGEST, Source, config_text, open_source
from trainer.report.tables import (
    changed_table,
    cost_table,
    events_table,
    final_table,
    memorisation_table,
    rejections_table,
    task_table,
)
from trainer.report.timesteps import bound_figure, forgetting_map, loss_curves
from trainer.report.training import training_figures
from trainer.run import RunDir

CSS_DPI = 96  # pixels of an inch on a page, by CSS
SAMPLES_BYTES = 2_000_000  # of pictures of samples by task within a page; more are linked to


@dataclass(frozen=True)
class Report:
    """Where a report lies: the page, and its figures by what they show."""

    index: Path
    figures: Mapping[str, Path]


def write_report(run: RunDir) -> Report:
    """Draw a finished run: figures as PNG, and the page, last, with all of them inside it.

    Raises:
        UserError: the run is not finished.
    """
    source = open_source(run)
    parts = _sections(source)
    files: dict[str, Path] = {}
    pictures: dict[str, bytes] = {}
    for drawn in (figure for part in parts for figure in part.figures):
        pictures[drawn.name] = drawn.png()
        files[drawn.name] = run.figure(drawn.name)
        write_atomic(files[drawn.name], pictures[drawn.name])
    history = history_png(source)
    if history is not None:
        files["history"] = run.history
        write_atomic(run.history, history)
    parts.insert(2, _samples(source, history))
    shown = {part: markup for part in parts if (markup := part.html(pictures))}
    contents = element("nav", join(link(f"#{part.name}", part.title) for part in shown), aria_label="contents")
    for path in set(run.report.glob("*.png")) - set(files.values()):  # of an earlier report: it would mislead
        path.unlink()
    content = page(source.name, [_title(source), contents, *shown.values()], **{DIGEST: source.digest})
    write_atomic(run.report_page, content)
    return Report(run.report_page, files)


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the page: text and tables, then figures, small ones side by side."""

    title: str
    name: str
    intro: Sequence[Html]
    figures: Sequence[Drawn] = ()
    after: Sequence[Html] = ()

    def html(self, pictures: Mapping[str, bytes]) -> Html:
        wide = [_figure(drawn, pictures[drawn.name]) for drawn in self.figures if drawn.wide]
        small = [_figure(drawn, pictures[drawn.name]) for drawn in self.figures if not drawn.wide]
        beside = [element("div", join(small), class_="figures")] if small else []
        if not any(self.intro) and not self.figures:
            return Html("")
        return section(self.title, self.name, *self.intro, *wide, *beside, *self.after)


def _figure(drawn: Drawn, png: bytes) -> Html:
    shown = picture(png, drawn.alt, drawn.caption, scale=CSS_DPI / DPI, wide=drawn.wide)
    return element("div", shown, drawn.numbers) if drawn.numbers else shown


def _sections(source: Source) -> list[Section]:
    """All that a run may tell; a part about what was not measured has nothing in it."""
    result, timesteps = source.result, int(source.setting("diffusion", "timesteps"))
    present = [figure for figure in (loss_curves(result, timesteps), forgetting_map(result, timesteps)) if figure]
    bars, bound, memorised = forgetting_figure(result), bound_figure(result), memorisation_figure(result)
    probes = probe_figure(result)
    length = int(source.setting("train", "images_per_task") or 0)
    return [
        Section("At the end", "end", [final_table(result)]),
        Section("Through the tasks", "course", [COURSE], course_figures(result), [task_table(result)]),
        Section("Each task after each task", "matrices", [MATRICES], matrix_figures(result, source.task_classes)),
        Section("Forgetting", "forgetting", [FORGETTING] if bars else [], [bars] if bars else []),
        Section("By timestep", "timesteps", [], present),
        Section("Representation", "representation", [PROBES] if probes else [], [probes] if probes else []),
        Section("Likelihood", "likelihood", [], [bound] if bound else []),
        Section("Memorisation", "memorisation", [memorisation_table(result)], [memorised] if memorised else []),
        Section("Training", "training", [], training_figures(source.log, length)),
        Section("Cost", "cost", [cost_table(result), rejections_table(result), events_table(result)]),
        Section("Configuration", "configuration", _configuration(source)),
    ]


COURSE = paragraph("Over all classes seen, after each task. Dashed: the floor.")
MATRICES = paragraph(
    "Rows: after learning a task; columns: measured of a task. Down a column one sees it forgotten. Light is "
    "good, dark is bad; hatched where too little was generated of a task to measure it. The last row is the floor, at "
    "the end."
)
FORGETTING = paragraph(
    "How much worse each task is at the end than at its best before (Chaudhry et al. 2018, arXiv 1801.10112); the "
    "loss: than right after the task was learnt."
)
PROBES = paragraph(
    "What the features of the model's encoder tell of the class: probes that learn it from real images of all classes "
    "seen, of earlier tasks as well, at each level of noise. So they tell what can be found in the features, not what "
    "the model itself remembers."
)


def _title(source: Source) -> Html:
    result, final = source.result, source.result["final"]
    penalty = source.setting("method", "penalty")
    method = str(result.get("method", "")) + (f" with {penalty}" if penalty not in (None, "", "none") else "")
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(source.run.metrics.stat().st_mtime))
    data = source.setting("data", "name")
    facts = [
        method,
        f"{data}, {source.tasks} task{'s' * (source.tasks != 1)}" if source.config else f"{source.tasks} tasks",
        f"seed {result['seed']}" if "seed" in result else "",
        f"measured {made}",
    ]
    counts = f"{final['samples']:,} samples" if "samples" in final else ""
    counts += f" against {final['real_images']:,} real images" if "real_images" in final else ""
    reference = f" ({final['fd_reference']})" if "fd_reference" in final else ""
    evaluator = f"evaluator {result.get('evaluator', 'unknown')}"
    return element(
        "header",
        element("h1", text(source.name)),
        paragraph(" · ".join(fact for fact in facts if fact), "facts"),
        paragraph(" · ".join(part for part in (counts + reference, evaluator) if part), "facts"),
    )


def _samples(source: Source, history: bytes | None) -> Section:
    """The forgetting that one can see: the same classes after each task; folded, all samples after each task."""
    parts: list[Html] = []
    if history is not None:
        caption = "The same classes after each task, one below the other. Grey: nothing was generated of the class."
        parts.append(picture(history, "Samples of each class, one row after each task", caption, wide=True))
    room = SAMPLES_BYTES
    for task in range(1, source.tasks + 1):
        path = source.run.samples(task)
        if not path.exists():
            continue
        title, size = f"all samples shown after task {task}", path.stat().st_size
        if size <= room:
            room -= size
            shown = picture(path.read_bytes(), f"Samples by class after task {task}", wide=True)
            parts.append(folded(title, shown))
        else:
            parts.append(element("p", link(relative(path, source.run.report), title)))
    return Section("Samples", "samples", parts)


def _configuration(source: Source) -> list[Html]:
    if not source.config:
        return []
    return [
        paragraph("What is not as it is by default:"),
        changed_table(source),
        folded("the whole configuration", element("pre", text(config_text(source)))),
    ]
