"""What figures show is what was measured."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.report.conftest import MakeRun, log_lines
from trainer.report.drawing import ANNOTATED, Drawn, colour_map, colour_norm, plain_log
from trainer.report.figures import course_figures, due_shares, forgetting_figure, matrix_figures
from trainer.report.measures import BY_KEY, as_array, digits
from trainer.report.representation import probe_figure
from trainer.report.timesteps import bound_figure, forgetting_map, loss_curves
from trainer.report.training import logged, training_figures


@pytest.fixture
def result(make_run: MakeRun) -> dict[str, Any]:
    return json.loads(make_run(tasks=4).metrics.read_text())


def axes_of(drawn: Drawn | None) -> list[Axes]:
    assert drawn is not None
    return drawn.figure.axes


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()}


def test_a_heat_map_holds_the_matrix_with_its_floor_below(result: dict[str, Any]) -> None:
    drawn = {figure.name: figure for figure in matrix_figures(result)}
    axes = axes_of(drawn["matrix-fd"])[0]
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown[:4], as_array(result["matrix"]["fd"]))
    np.testing.assert_array_equal(shown[4], as_array(result["floor"]["fd"][-1]))
    assert digits(result["matrix"]["fd"][2][1]) in texts(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3", "4", "floor"]
    assert f"{100 * result['matrix']['recall'][3][0]:.0f}" in texts(axes_of(drawn["matrix-recall"])[0])
    assert len(axes_of(drawn["matrix-loss"])[0].get_images()[0].get_array()) == 4  # a loss has no floor


def test_many_tasks_have_no_numbers_in_their_cells(make_run: MakeRun) -> None:
    for tasks in (ANNOTATED - 1, ANNOTATED + 2):
        result = json.loads(make_run(f"run-{tasks}", tasks=tasks).metrics.read_text())
        for drawn in matrix_figures(result):
            assert bool(texts(axes_of(drawn)[0])) == (tasks < ANNOTATED), drawn.name
        assert bool(texts(axes_of(forgetting_map(result, 1000))[0])) == (tasks < ANNOTATED)


@pytest.mark.parametrize("key", sorted(BY_KEY))
def test_worse_is_darker(key: str) -> None:
    measure = BY_KEY[key]
    values = np.linspace(0.05, 0.95, 7)
    colours = colour_map(measure)(colour_norm(measure, [values])(values))[:, :3]
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    better = np.diff(values) if measure.higher_is_better else -np.diff(values)
    assert (np.sign(np.diff(lightness)) == np.sign(better)).all()


def test_a_lost_task_is_hatched_and_what_is_not_learnt_is_empty(result: dict[str, Any]) -> None:
    result["matrix"]["fd"][3][0] = None
    axes = axes_of(matrix_figures(result)[0])[0]
    places = [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in axes.patches]  # pyright: ignore
    assert places == [(0.0, 3.0)]
    assert len(texts(axes)) == 10 - 1 + 4  # the learnt but one, and the floor


def test_shares_are_coloured_by_what_is_due(result: dict[str, Any]) -> None:
    due = due_shares(3, [[0], [1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_allclose(due[2], [1 / 8, 3 / 8, 4 / 8])
    np.testing.assert_allclose(due[1, :2], [1 / 4, 3 / 4])
    drawn = next(figure for figure in matrix_figures(result, [[0, 1]] * 4) if figure.name == "matrix-share")
    axes = axes_of(drawn)[0]
    shades = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    np.testing.assert_allclose(shades[3], as_array(result["matrix"]["share"])[3] * 4)
    assert f"{100 * result['matrix']['share'][3][0]:.0f}" in texts(axes)


def test_curves_through_the_tasks(result: dict[str, Any]) -> None:
    drawn = {figure.name: figure for figure in course_figures(result)}
    shown, floor = axes_of(drawn["course-kld"])[0].get_lines()
    np.testing.assert_array_equal(shown.get_ydata(), [row["kld"] for row in result["after_task"]])
    np.testing.assert_array_equal(floor.get_ydata(), [row["floor"]["kld"] for row in result["after_task"]])
    both = axes_of(drawn["course-precision"])[0]
    np.testing.assert_array_equal(lines(both)["recall"], [row["recall"] for row in result["after_task"]])


def test_bars_of_forgetting(result: dict[str, Any]) -> None:
    fd, accuracy, loss = axes_of(forgetting_figure(result))
    heights = [bar.get_height() for bar in fd.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == pytest.approx(result["final"]["forgetting_per_task"])
    matrix = as_array(result["matrix"]["accuracy"])
    wanted = [matrix[j:-1, j].max() - matrix[-1, j] for j in range(3)]
    assert [bar.get_height() for bar in accuracy.patches] == pytest.approx(wanted)  # pyright: ignore
    means = [np.mean(bins) for bins in result["final"]["forgetting_loss_bins"]]
    assert [bar.get_height() for bar in loss.patches] == pytest.approx(means)  # pyright: ignore


def test_a_task_that_is_lost_says_so(result: dict[str, Any]) -> None:
    result["matrix"]["fd"][3][1] = None
    assert texts(axes_of(forgetting_figure(result))[0]) == ["lost"]


def test_losses_by_timestep(result: dict[str, Any]) -> None:
    panels = axes_of(loss_curves(result, 600))[:4]
    assert list(lines(panels[0])) == ["right after", "at the end"]  # no model came before the first task
    assert list(lines(panels[3])) == ["before it was learnt", "right after"]  # which is the end
    bins = result["matrix"]["loss_bins"]
    shown = lines(panels[1])
    np.testing.assert_array_equal(shown["before it was learnt"], result["loss_before"][1])
    np.testing.assert_array_equal(shown["right after"], bins[1][1])
    np.testing.assert_array_equal(shown["at the end"], bins[3][1])
    np.testing.assert_array_equal(panels[0].get_lines()[0].get_xdata(), [50, 150, 250, 350, 450, 550])


def test_forgetting_by_timestep(result: dict[str, Any]) -> None:
    left, right = axes_of(forgetting_map(result, 1000))[:2]
    grown = as_array(result["final"]["forgetting_loss_bins"])
    np.testing.assert_allclose(np.asarray(left.get_images()[0].get_array()), grown)
    learnt = as_array([result["matrix"]["loss_bins"][task][task] for task in range(3)])
    np.testing.assert_allclose(np.asarray(right.get_images()[0].get_array()), 100 * grown / learnt)


def test_terms_of_the_bound_are_those_of_single_timesteps(result: dict[str, Any]) -> None:
    axes = axes_of(bound_figure(result))[0]
    heights, edges, _ = axes.patches[-1].get_data()  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(heights, [1.0, 0.5 / 8, 0.25 / 90, 0.125 / 900])
    np.testing.assert_array_equal(edges, [1, 2, 10, 100, 1000])
    assert "1.25 are the decoder's" in (drawn.caption if (drawn := bound_figure(result)) else "")


def test_probes_of_earlier_tasks_are_fainter(make_run: MakeRun) -> None:
    probed = json.loads(make_run("probed", tasks=4, classifying=True).metrics.read_text())
    probed["after_task"][0]["probe"]["linear"] = [None] * 4  # of a first task with one class
    for axes, kind in zip(axes_of(probe_figure(probed))[:2], ("linear", "knn"), strict=True):
        shown = axes.get_lines()
        opacities = [line.get_alpha() or 0.0 for line in shown]
        assert opacities == sorted(set(opacities)) and opacities[-1] == 1.0 and len(shown) == 4
        for line, row in zip(shown, probed["after_task"], strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [0, 10, 50, 100])
            np.testing.assert_array_equal(line.get_ydata(), as_array(row["probe"][kind]))
    del probed["after_task"][0]["probe"], probed["after_task"][1]["probe"], probed["after_task"][2]["probe"]
    assert len(axes_of(probe_figure(probed))[0].get_lines()) == 1


def test_a_model_that_classifies_has_bars_and_a_course(make_run: MakeRun, result: dict[str, Any]) -> None:
    own = json.loads(make_run("own", tasks=4, classifying=True).metrics.read_text())
    assert probe_figure(result) is None and len(axes_of(forgetting_figure(result))) == 3
    bars = axes_of(forgetting_figure(own))[2]
    matrix = as_array(own["matrix"]["model_accuracy"])
    wanted = [matrix[j:-1, j].max() - matrix[-1, j] for j in range(3)]
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(wanted)  # pyright: ignore
    course = next(figure for figure in course_figures(own) if figure.name == "course-accuracy")
    shown = lines(axes_of(course)[0])["model accuracy"]
    np.testing.assert_array_equal(shown, [row["model_accuracy"] for row in own["after_task"]])


def test_what_was_logged_over_the_images_seen() -> None:
    log = log_lines(3, 100)
    drawn = {figure.name: figure for figure in training_figures(log, 100)}
    assert drawn.keys() == {"training-loss", "training-speed", "training-waits"}  # no gradient, no penalty logged
    loss = axes_of(drawn["training-loss"])[0]
    first, _, replay = loss.get_lines()[:3]
    np.testing.assert_array_equal(first.get_xdata(), [50, 100, 150, 200, 250, 300])
    np.testing.assert_allclose(first.get_ydata(), [line["loss"] for line in log])
    np.testing.assert_array_equal(replay.get_xdata(), [150, 200, 250, 300])
    waits = lines(axes_of(drawn["training-waits"])[0])["for replay"]
    np.testing.assert_allclose(waits, [0.2, 0.2, 0.4, 0.4, 0.6, 0.6])  # 50 images at 100 a second take half a second
    assert training_figures([], 100) == []


def test_tasks_that_see_more_are_longer() -> None:
    log = [{"task": task, "seen": seen, "loss": 1.0} for task, seen in ((1, 5), (1, 10), (2, 10), (2, 30), (3, 30))]
    axes = axes_of(training_figures(log, 10)[0])[0]
    np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), [5, 10, 20, 40, 70])
    assert axes.get_xlim() == (0, 70)
    assert [line.get_xdata()[0] for line in axes.get_lines()[1:]] == [10, 40]  # pyright: ignore


def test_a_loss_that_is_the_current_tasks_alone_is_drawn_once() -> None:
    log = [{"task": 1, "seen": seen, "loss": 1 / seen, "current": 1 / seen} for seen in (1, 2, 3)]
    axes = axes_of(training_figures(log, 3)[0])[0]
    assert len([line for line in axes.get_lines() if len(line.get_xdata()) == 3]) == 1  # pyright: ignore


def test_waits_without_a_rate_are_unknown() -> None:
    assert np.isnan(logged([{"task": 1, "seen": 4, "replay_wait_seconds": 1.0}], "replay_wait_share")).all()


@pytest.mark.parametrize(
    ("low", "high"), [(2.4, 12.0), (1.1, 3.9), (100.0, 110.0), (0.03, 0.9), (0.006, 4.2), (1.0, 1e7)]
)
def test_a_label_of_a_log_scale_says_where_it_stands(low: float, high: float) -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_log(axes.yaxis, low, high)
    places = [float(place) for place in axes.get_yticks() if low <= place <= high]
    assert len(places) >= 2
    labels = axes.yaxis.get_major_formatter().format_ticks(places)
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(places, rel=1e-9)
