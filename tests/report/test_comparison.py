"""The page over many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from tests.report.checks import read_page, rows, sections
from tests.report.conftest import MakeRun
from trainer.compare import Comparison, Row, Run
from trainer.compare_report import cells, rich_tables, write_report
from trainer.report.comparison_figures import Group, Member, matrix_comparisons, overview, timestep_figure
from trainer.report.measures import BY_KEY, as_array, digits
from trainer.report.spread import band

ROWS = ("plain", "better")


@pytest.fixture
def runs(make_run: MakeRun, tmp_path: Path) -> list[Run]:
    """Two rows of two seeds, all finished."""
    found = []
    for seed in (0, 1):
        for place, name in enumerate(ROWS):
            directory = make_run(f"{name}-seed{seed}", tasks=3, seed=10 * place + seed)
            result = json.loads(directory.metrics.read_text())
            run = Run(name, seed, [], directory, tmp_path / "log", 3, result=result)
            found.append(run)
    return found


@pytest.fixture
def groups(runs: list[Run]) -> list[Group]:
    members = {name: [run for run in runs if run.row == name] for name in ROWS}
    return [
        Group(name, tuple(Member(run.seed, run.directory.root, run.result) for run in mine))
        for name, mine in members.items()
    ]


def comparison(out: Path, mean: bool) -> Comparison:
    return Comparison("digits.yaml", tuple(Row(name, ()) for name in ROWS), (0, 1), out, mean=mean, command="<command>")


def stacked(group: Group, *keys: str) -> np.ndarray:
    def at(value: Any) -> Any:
        for key in keys:
            value = value[key]
        return value

    return np.array([as_array(at(result)) for result in group.results])


def curve(axes: Axes, label: str) -> np.ndarray:
    return next(np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_label() == label)


def test_the_page_tells_of_rows_seeds_and_runs(runs: list[Run], tmp_path: Path) -> None:
    for run in runs[:2]:
        run.directory.report.mkdir()
        run.directory.report_page.write_text("its report")
        Image.new("RGB", (30, 20)).save(run.directory.history)
    paths = write_report(comparison(tmp_path, mean=True), runs)
    assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.png", "index.html"]
    root = read_page(paths[-1])
    found = sections(root)
    assert list(found) == ["results", "timesteps", "samples", "matrices", "cost", "runs"]
    header, plain, _ = rows(found["results"].all("table")[0])
    finals = [run.result["final"]["fd"] for run in runs if run.row == "plain" and run.result]
    assert plain[header.index("FD")] == f"{np.mean(finals):.1f} ± {np.std(finals, ddof=1):.3f}"
    assert "<command>" in root.all("header")[0].content
    assert [link.attributes["href"] for link in found["runs"].all("a")] == [
        f"{name}-seed0/report/index.html" for name in ROWS
    ]
    assert len(found["samples"].all("img")) == 2 and "better, seed 0" in found["samples"].content
    matrix = np.mean(
        [as_array(run.result["matrix"]["fd"]) for run in runs if run.row == "better" and run.result], axis=0
    )
    shown = [row for table in found["matrices"].all("table") for row in rows(table)]
    assert ["3", *(digits(value, BY_KEY["fd"]) for value in matrix[2])] in shown
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == [
        *("compare-matrix-accuracy", "compare-matrix-fd", "compare-matrix-loss", "compare-matrix-share"),
        "compare-timesteps",
    ]


@pytest.mark.parametrize("mean", [True, False])
def test_middles_and_spreads_are_numpys(groups: list[Group], mean: bool) -> None:
    above, below = np.array(overview(groups, mean).figure.axes).reshape(2, -1)
    for group, bar in zip(groups, above[0].get_lines()[1::2], strict=True):
        finals = [result["final"]["fd"] for result in group.results]
        np.testing.assert_allclose(bar.get_ydata(), [np.mean(finals) if mean else np.median(finals)] * 2)
    for group, area in zip(groups, below[0].collections, strict=True):
        values = np.array([[row["fd"] for row in result["after_task"]] for result in group.results])
        sd = values.std(axis=0, ddof=1)
        middle = values.mean(axis=0) if mean else np.median(values, axis=0)
        np.testing.assert_allclose(curve(below[0], group.name), middle)
        edges = area.get_paths()[0].vertices
        wanted = (middle - sd, middle + sd) if mean else (values.min(axis=0), values.max(axis=0))
        for task in (1, 2, 3):
            heights = edges[edges[:, 0] == task, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [edge[task - 1] for edge in wanted])


def test_forgetting_by_timestep_is_a_mean_over_tasks_and_seeds(groups: list[Group]) -> None:
    drawn = timestep_figure(groups, 1000, mean=True)
    assert drawn is not None
    for group in groups:
        wanted = stacked(group, "final", "forgetting_loss_bins").mean(axis=(0, 1))
        np.testing.assert_allclose(curve(drawn.figure.axes[0], group.name), wanted)


def test_heat_maps_of_rows_share_their_colours(groups: list[Group]) -> None:
    figure = next(one for one in matrix_comparisons(groups, mean=True) if one.name == "compare-matrix-fd").figure
    images = [axes.get_images()[0] for axes in figure.axes[:2]]
    for image, group in zip(images, groups, strict=True):
        shown = np.ma.filled(image.get_array(), np.nan)
        np.testing.assert_allclose(shown, stacked(group, "matrix", "fd").mean(axis=0))
    assert images[0].norm is images[1].norm


def test_what_some_seeds_lack_is_left_out_of_the_middle() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    middle, low, high = band(values, mean=True)
    np.testing.assert_allclose(middle, [2.0, 5.0, np.nan])
    np.testing.assert_allclose(high - middle, [np.sqrt(2.0), 0.0, np.nan])
    np.testing.assert_allclose(band(values, mean=False)[1], [1.0, 5.0, np.nan])
    assert low.shape == (3,)


def test_models_that_classify_have_columns_of_their_own(runs: list[Run], make_run: MakeRun, tmp_path: Path) -> None:
    """One row's models classify, the other's do not; results from before there were such models have no column."""
    before = cells(comparison(tmp_path, mean=False), runs)
    assert before[0][5:7] == ["forgetting", "seconds"] and len(rich_tables(comparison(tmp_path, mean=False), runs)) == 1
    for run in runs[1::2]:
        run.directory = make_run(f"own-seed{run.seed}", tasks=3, classifying=True, seed=run.seed)
        run.result = json.loads(run.directory.metrics.read_text())
    write_report(comparison(tmp_path, mean=True), runs)
    found = sections(read_page(tmp_path / "index.html"))
    header, plain, better = rows(found["results"].all("table")[0])
    places = [header.index(name) for name in ("average accuracy", "accuracy forgotten", "BWT")]
    finals = [run.result["final"] for run in runs[1::2] if run.result]
    keys = ("average_accuracy", "forgetting_model_accuracy", "backward_transfer")
    for place, key in zip(places, keys, strict=True):
        values = [final[key] for final in finals]
        assert plain[place] == "-" and better[place] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    listed = rows(found["runs"].all("table")[0])
    one = dict(zip(listed[0], listed[3], strict=True))
    assert one["average accuracy"] == digits(finals[0]["average_accuracy"]) and one["training"] == "1:15"
    assert (tmp_path / "figures" / "compare-matrix-model-accuracy.png").exists()
    tables = rich_tables(comparison(tmp_path, mean=True), runs)
    assert [str(column.header) for column in tables[1].columns][2:] == [header[place] for place in places]
    assert len(tables[0].columns) == len(before[0])


def test_names_from_outside_and_failed_runs(runs: list[Run], tmp_path: Path) -> None:
    runs[0].result, runs[0].error = None, "<img src=//evil> & more"
    write_report(comparison(tmp_path, mean=False), runs)
    found = sections(read_page(tmp_path / "index.html"))
    assert "<img src=//evil> & more" in found["runs"].content and "plain seed 0 failed" in found["results"].content
