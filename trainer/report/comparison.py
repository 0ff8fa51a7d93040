"""The page of a comparison: `index.html` over its rows and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.shards import write_atomic
from trainer.report.comparison_figures import Group, Member, matrix_comparisons, overview, timestep_figure
from trainer.report.drawing import Drawn
from trainer.report.html import Html, element, join, link, page, paragraph, picture, relative, table, text
from trainer.report.measures import digits, number
from trainer.report.page import Section
from trainer.report.spread import spread_name, spread_text, statistics_of
from trainer.report.tables import COSTS, cost_text
from trainer.run import RunDir

FIGURES = "figures"  # the folder beside the page
OWN_CLASSIFIER = {  # of the model, where it has one: key of a final result, title of its column
    "average_accuracy": "average accuracy",
    "forgetting_model_accuracy": "accuracy forgotten",
    "backward_transfer": "BWT",
}


@dataclass(frozen=True)
class Findings:
    """What a comparison found.

    cells: its table as text, header first; remarks: what a reader of it must know; facts: lines about command and
    machine; mean: whether middles are means (with the standard deviation), or medians (with the range).
    """

    title: str
    cells: Sequence[Sequence[str]]
    remarks: Sequence[str]
    facts: Sequence[str]
    groups: Sequence[Group]
    timesteps: int
    task_classes: Sequence[Sequence[int]]
    mean: bool


def write_comparison(findings: Findings, out: Path) -> list[Path]:
    """Write `compare.png`, other figures and, last, `index.html` to a directory; returns the paths of the first and
    the last. Without a finished run there is a page with the reasons, and no figure."""
    drawn = _figures(findings)
    pictures = {figure.name: figure.png() for figure in drawn}
    for name, data in pictures.items():
        write_atomic(out / "compare.png" if name == "compare" else out / FIGURES / f"{name}.png", data)
    parts = [part for part in _sections(findings, drawn, out) if part.html(pictures)]
    contents = element("nav", join(link(f"#{part.name}", part.title) for part in parts), aria_label="contents")
    title = element(
        "header", element("h1", text(findings.title)), *(paragraph(fact, "facts") for fact in findings.facts)
    )
    write_atomic(out / "index.html", page(findings.title, [title, contents, *(part.html(pictures) for part in parts)]))
    return [*([out / "compare.png"] if drawn else []), out / "index.html"]


def _figures(findings: Findings) -> list[Drawn]:
    if not any(group.results for group in findings.groups):
        return []
    by_timestep = timestep_figure(findings.groups, findings.timesteps, findings.mean)
    found = [overview(findings.groups, findings.mean), *([by_timestep] if by_timestep else [])]
    return [*found, *matrix_comparisons(findings.groups, findings.mean, findings.task_classes)]


def _sections(findings: Findings, drawn: Sequence[Drawn], out: Path) -> list[Section]:
    header, *lines = findings.cells
    names = [header[0] or "row", *header[1:]]
    warnings = [paragraph(remark, "warning") for remark in findings.remarks]
    over = paragraph(f"{spread_name(findings.mean)} over seeds.")
    return [
        Section("Results", "results", [*warnings, over, table(names, [_stacked(line) for line in lines])], drawn[:1]),
        Section("By timestep", "timesteps", [], [figure for figure in drawn if figure.name == "compare-timesteps"]),
        Section("Samples", "samples", _histories(findings.groups)),
        Section(
            *("Each task after each task", "matrices"),
            [],
            [figure for figure in drawn if figure.name.startswith("compare-matrix")],
        ),
        Section("Cost", "cost", [_costs(findings)]),
        Section("Runs", "runs", [_runs(findings.groups, out)]),
    ]


def _histories(groups: Sequence[Group]) -> list[Html]:
    """Samples through time of the first finished seed of each row, one below the other."""
    parts: list[Html] = []
    for group in groups:
        member = next((member for member in group.members if RunDir(member.directory).history.exists()), None)
        if member is None or member.result is None:
            continue
        alt = f"Samples of {group.name}, seed {member.seed}: the same classes after each task, one row for each"
        parts.append(element("h3", text(f"{group.name}, seed {member.seed}")))
        parts.append(picture(RunDir(member.directory).history.read_bytes(), alt, wide=True))
    return parts


def _costs(findings: Findings) -> Html:
    """The costs by row; seconds in plain numbers, so that their spread can be read."""
    rows = []
    known = [cost for cost in COSTS if any(_cost_values(group, cost[0]) for group in findings.groups)]
    for group in findings.groups:
        values = [_cost_values(group, key) for key, _, _ in known]
        rows.append(
            [group.name, *(spread_text(statistics_of(found) if found else None, findings.mean) for found in values)]
        )
    units = {"duration": ", s", "seconds": ", s", "GB": ", GB"}
    header = ["row", *(title + units.get(kind, "") for _, title, kind in known)]
    return table(header, [_stacked(row) for row in rows]) if known else Html("")


def _stacked(line: Sequence[str]) -> list[Html]:
    """Ranges below their medians: a row has many of them."""
    return [text(line[0]), *(Html(text(value).replace(" (", "<br>(")) for value in line[1:])]


def _cost_values(group: Group, key: str) -> list[float]:
    found = [number((result.get("cost") or {}).get(key)) for result in group.results]
    return [value for value in found if value is not None]


def _runs(groups: Sequence[Group], out: Path) -> Html:
    """Each run with its own numbers, and where its report lies."""
    results = [result for group in groups for result in group.results]
    more = [key for key in OWN_CLASSIFIER if any(number(result["final"].get(key)) is not None for result in results)]
    keys = ("fd", "kld", "accuracy", "forgetting", *more)
    rows = [
        [_address(group, member, out), str(member.seed), *_numbers(member.result, keys), _time(member), member.error]
        for group in groups
        for member in group.members
    ]
    titles = ["FD", "KLD", "accuracy", "forgetting", *(OWN_CLASSIFIER[key] for key in more)]
    header = ["run", "seed", *titles, "training", "what went wrong"]
    failed = any(member.error for group in groups for member in group.members)
    shown = rows if failed else [row[:-1] for row in rows]
    return table(header if failed else header[:-1], shown, words=(len(header) - 1,))


def _address(group: Group, member: Member, out: Path) -> str | Html:
    path = RunDir(member.directory).report_page
    return link(relative(path, out), group.name) if path.exists() else group.name


def _numbers(result: Mapping[str, object] | None, keys: Sequence[str]) -> list[str]:
    final = result["final"] if result is not None else {}
    assert isinstance(final, Mapping)
    return [digits(number(final.get(key))) for key in keys]


def _time(member: Member) -> str:
    seconds = number((member.result or {}).get("cost", {}).get("train_seconds"))
    return "" if seconds is None else cost_text(seconds, "duration")
