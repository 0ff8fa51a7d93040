"""The report on one run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.report.checks import read_page, rows, sections
from tests.report.conftest import BINS, COST, MakeRun
from trainer.errors import UserError
from trainer.report.html import EMBEDDED_BYTES, data_uri
from trainer.report.measures import BY_KEY, digits
from trainer.report.page import write_report
from trainer.report.source import is_current
from trainer.run import RunDir

ALL = ["end", "course", "samples", "matrices", "forgetting", "timesteps", "likelihood", "memorisation", "training"]
Change = Callable[[dict[str, Any]], None]


def changed(run: RunDir, change: Change) -> None:
    content = json.loads(run.metrics.read_text())
    change(content)
    run.metrics.write_text(json.dumps(content))


def test_a_run_with_everything_tells_everything(make_run: MakeRun) -> None:
    run = make_run(tasks=3)
    report = write_report(run)
    root = read_page(report.index)
    assert list(sections(root)) == [*ALL, "cost", "configuration"]
    assert [link.content for link in root.all("nav")[0].all("a")] == [head.content for head in root.all("h2")]
    assert {path.stem for path in run.report.glob("*.png")} == report.figures.keys()
    embedded = [base64.b64decode(image.attributes["src"].partition(",")[2]) for image in root.all("img")]
    for path in report.figures.values():
        assert path.read_bytes() in embedded, path  # the same figures as files and in the page
    assert report.index.stat().st_size < 3_000_000


def test_every_measured_value_stands_in_a_table(make_run: MakeRun) -> None:
    run = make_run(tasks=4)
    result = json.loads(run.metrics.read_text())
    found = sections(read_page(write_report(run).index))
    tables = {table.content: rows(table) for table in found["matrices"].all("table")}
    shown = [row for lines in tables.values() for row in lines]
    for key, matrix in result["matrix"].items():
        if key == "loss_bins":
            continue
        for task, line in enumerate(matrix, 1):
            texts = ["" if value is None else digits(value, BY_KEY[key]) for value in line]
            assert [str(task), *texts] in shown, key
    for key in ("fd", "precision", "recall", "density", "coverage", "accuracy"):
        assert ["floor", *(digits(value, BY_KEY[key]) for value in result["floor"][key][-1])] in shown, key
    by_bin = rows(found["timesteps"].all("table")[0])
    for task, line in enumerate(result["matrix"]["loss_bins"][-1], 1):
        when = "at the end" if task < 4 else "right after"
        assert [f"task {task}, {when}", *map(digits, line)] in by_bin
    assert by_bin[0][1:] == ["0-167", "167-333", "333-500", "500-667", "667-833", "833-1000"] and BINS == 6


def test_the_final_table_has_floor_counts_and_source_beside_each_measure(make_run: MakeRun) -> None:
    run = make_run(tasks=2)
    final = json.loads(run.metrics.read_text())["final"]
    lines = {line[0]: line[1:] for line in rows(sections(read_page(write_report(run).index))["end"].all("table")[0])}
    distance = lines["Fréchet distance"]
    assert distance[:4] == [digits(final["fd"]), digits(final["floor"]["fd"]), "↓", "2,000 against 900"]
    assert distance[-1] == "Heusel et al. 2017, arXiv 1706.08500"
    assert lines["recall"][:3] == [f"{final['recall']:.3f}", "0.700", "↑"] and "1904.06991" in lines["recall"][-1]
    assert lines["loss"][1] == "" and lines["loss"][3] == "64 test images"
    assert lines["bits per dimension"][0].endswith(" ± 0.062") and "2006.11239" in lines["bits per dimension"][-1]
    assert lines["forgetting, FD"][0] == digits(final["forgetting"]) and "1801.10112" in lines["forgetting, FD"][-1]


def test_a_result_of_the_first_version_has_no_empty_sections(make_run: MakeRun) -> None:
    run = make_run(tasks=2, everything=False)
    run.config.unlink()
    root = read_page(write_report(run).index)
    assert list(sections(root)) == ["end", "course", "matrices", "forgetting", "cost"]
    assert "floor" not in sections(root)["matrices"].all("table")[0].content
    assert "1 task" not in root.all("header")[0].content and "2 tasks" in root.all("header")[0].content


def test_a_key_that_the_file_of_a_run_lacks_counts_as_its_default(make_run: MakeRun) -> None:
    run = make_run(tasks=2)
    held = yaml.safe_load(run.config.read_text())
    del held["diffusion"], held["method"]["penalty"], held["tracking"]
    run.config.write_text(yaml.safe_dump(held))
    found = sections(read_page(write_report(run).index))
    listed = rows(found["configuration"].all("table")[0])
    assert ["data.name", "stripes", "digits"] in listed or ["data.name", "stripes", ""] in listed
    assert ["train.images_per_task", "100", str(held["train"]["images_per_task"])] not in listed
    assert not [line for line in listed if line[0].startswith(("diffusion.", "tracking."))]
    assert "833-1000" in found["timesteps"].content


def test_what_comes_from_outside_is_text(make_run: MakeRun) -> None:
    hostile = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
    run = make_run(tasks=2)
    held = yaml.safe_load(run.config.read_text())
    held["run"]["name"] = held["data"]["name"] = hostile
    held[hostile] = {hostile: hostile}
    run.config.write_text(yaml.safe_dump(held))
    run.teacher(2).mkdir(parents=True)
    (run.teacher(2) / "card.json").write_text(json.dumps({"class_names": [hostile, "\x00", 3, "<b>"]}))

    def change(content: dict[str, Any]) -> None:
        content["method"] = content["evaluator"] = hostile
        content["replay"]["events"][hostile] = 2
        content["final"]["nearest"] = {hostile: content["final"]["nearest"]["buffer"]}
        content["final"]["lost_tasks"] = [hostile]

    changed(run, change)
    report = write_report(run)
    root = read_page(report.index)  # refuses scripts, handlers and addresses
    assert "<script" not in report.index.read_text()
    assert root.all("h1")[0].content == hostile == root.all("title")[0].content
    assert hostile in root.all("pre")[0].content and hostile in sections(root)["memorisation"].content


@pytest.mark.parametrize("tasks", [1, 20])
def test_one_task_and_twenty(make_run: MakeRun, tasks: int) -> None:
    run = make_run(tasks=tasks)
    found = sections(read_page(write_report(run).index))
    assert ("forgetting" in found) == (tasks > 1)
    assert len(rows(found["matrices"].all("table")[0])) == 1 + tasks + 1
    assert {"timesteps", "samples", "training"} <= found.keys()


def test_a_model_that_classifies_and_its_features_are_shown(make_run: MakeRun) -> None:
    run = make_run(tasks=3, classifying=True)
    result = json.loads(run.metrics.read_text())
    final, matrix = result["final"], result["matrix"]["model_accuracy"]
    report = write_report(run)
    found = sections(read_page(report.index))
    assert "representation" in found and {"probes", "matrix-model-accuracy"} <= report.figures.keys()
    lines = {line[0]: line[1:] for line in rows(found["end"].all("table")[0])}
    assert lines["model accuracy"][:4] == [f"{final['model_accuracy']:.3f}", "", "↑", "150 test images"]
    assert lines["average accuracy"][0] == f"{np.mean(matrix[-1]):.3f}" and "1706.08840" in lines["average accuracy"][5]
    transfer = np.mean([matrix[2][0] - matrix[0][0], matrix[2][1] - matrix[1][1]])
    assert lines["backward transfer"][0] == f"{transfer:.3f}" and transfer < 0
    assert lines["linear probe"][:4] == [f"{0.95 / 1.3:.3f}", "", "↑", "180 test images"]
    assert "3,600 training images" in lines["linear probe"][4] and "t = 10" in lines["k-NN probe"][4]
    assert lines["forgetting, model accuracy"][0] == f"{final['forgetting_model_accuracy']:.3f}"
    numbers = rows(found["representation"].all("table")[0])
    assert numbers[0] == ["probe, after task", "t = 0", "t = 10", "t = 50", "t = 100"] and len(numbers) == 7
    assert numbers[3] == ["linear probe, 3", *(f"{value / 1.3:.3f}" for value in (0.9, 0.95, 0.8, 0.6))]
    old = sections(read_page(write_report(make_run("old")).index))
    assert "representation" not in old and "average accuracy" not in old["end"].content


def test_the_classifier_learnt_with_the_tasks_is_shown_where_there_is_one(make_run: MakeRun) -> None:
    run = make_run(tasks=2)
    assert "classifier learnt" not in sections(read_page(write_report(run).index))["end"].content

    def change(content: dict[str, Any]) -> None:
        content["matrix"]["classifier_accuracy"] = [[0.975, None], [0.625, 0.875]]
        content["final"]["classifier_accuracy"] = 0.75
        for row, value in zip(content["after_task"], (0.975, 0.75), strict=True):
            row["classifier_accuracy"] = value

    changed(run, change)
    report = write_report(run)
    found = sections(read_page(report.index))
    line = next(line for line in rows(found["end"].all("table")[0]) if "classifier learnt" in line[0])
    assert line[1:4] == ["0.750", "", "↑"]
    assert ["2", "0.625", "0.875"] in [row for table in found["matrices"].all("table") for row in rows(table)]
    header, first, *_ = rows(found["forgetting"].all("table")[0])
    assert dict(zip(header, first, strict=True))["accuracy of the classifier learnt with the tasks"] == "0.350"
    assert "matrix-classifier-accuracy" in report.figures


def test_costs_and_faults(make_run: MakeRun) -> None:
    found = sections(read_page(write_report(make_run(tasks=2)).index))
    costs, faults = (dict(map(tuple, rows(table)[1:])) for table in found["cost"].all("table"))
    assert costs["teacher evaluations"] == "123,456" and costs["wall time, all attempts"] == "1:02:05"
    assert costs["waited for replay"] == "3.25 s" and len(costs) == len([x for x in COST.values() if x is not None])
    assert faults == {"corrupt shard": "3"}


def test_a_report_knows_what_it_was_made_of(make_run: MakeRun) -> None:
    run = make_run(tasks=2)
    assert not is_current(run)
    write_report(run)
    assert is_current(run)
    changed(run, lambda content: content["final"].update(fd=1.0))
    assert not is_current(run)
    (run.figure("matrix-of-old")).write_bytes(b"")
    changed(run, lambda content: [row.pop("bpd_terms") for row in content["after_task"]])
    report = write_report(run)
    assert is_current(run) and "likelihood" not in report.figures
    assert {path.stem for path in run.report.glob("*.png")} == report.figures.keys()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tasks": 1}', '{"after_task": [], "matrix": {}, "final": {}}'])
def test_a_run_that_is_not_finished_has_no_report(make_run: MakeRun, text: str) -> None:
    run = make_run(tasks=1)
    run.metrics.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json: .*finished run"):
        write_report(run)
    run.metrics.unlink()
    with pytest.raises(UserError, match="finished run"):
        write_report(run)
    assert not is_current(run)


def test_the_history_is_drawn_of_what_the_run_keeps(make_run: MakeRun) -> None:
    run = make_run(tasks=3)
    write_report(run)
    with Image.open(run.history) as image:
        whole = image.size
    run.real_samples.unlink()  # as in a run of a version that drew the picture itself
    before = run.history.read_bytes()
    write_report(run)
    assert run.history.read_bytes() == before
    run.history.unlink()
    write_report(run)
    with Image.open(run.history) as image:
        assert image.width == whole[0] and whole[1] - image.height == 48 + 2 + 4  # without the row of real images


def test_large_pictures_of_samples_are_linked_to(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tasks=2)
    for task in (1, 2):
        Image.fromarray(np.full((20, 30, 3), task, dtype=np.uint8)).save(run.samples(task))
    monkeypatch.setattr("trainer.report.page.SAMPLES_BYTES", run.samples(1).stat().st_size + 1)
    samples = sections(read_page(write_report(run).index))["samples"]
    assert [link.attributes["href"] for link in samples.all("a")] == ["../tasks/2/samples.png"]
    assert len(samples.all("img")) == 2  # the history, and task 1


def test_a_large_grid_becomes_a_small_picture() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, format="PNG")
    assert len(data.getvalue()) > EMBEDDED_BYTES
    kind, _, content = data_uri(data.getvalue()).partition(",")
    assert kind == "data:image/jpeg;base64" and len(content) < len(data.getvalue())
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), dtype=np.float64)
    assert abs(shown.mean() - noise.mean()) < 1.0 and shown.shape == noise.shape
