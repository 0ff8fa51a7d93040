"""A whole evaluation: what stands in metrics.json, the same from one rank and from two, and what is done again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.distributed.conftest import Pools
from tests.distributed.judge_cases import SETTINGS, judge, open_judge
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.models.teacher import load_teacher
from trainer.run import RunDir
from trainer.settings import load_config
from trainer.tracking.table import plain_result
from trainer.world import World

EVERYTHING = [
    "evaluation.loss_images=9",
    "evaluation.timestep_bins=4",
    "evaluation.bpd_images=6",
    "evaluation.bpd_timesteps=7",
    "evaluation.nearest_training=true",
]
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def judged(place: Path) -> dict[str, Any]:
    return judge(ALONE, str(place), "alone", EVERYTHING)


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Numbers by their place."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return {where: value} if parts is None else {k: v for key, x in parts for k, v in flat(x, f"{where}/{key}").items()}


def test_the_result_has_each_measure_with_its_count_and_its_floor(judged: dict[str, Any], place: Path) -> None:
    final, matrix = judged["final"], judged["matrix"]
    for metric in ("fd", "precision", "recall", "density", "coverage", "accuracy", "kld"):
        assert isinstance(final[metric], float) and isinstance(final["floor"][metric], float), metric
    assert final["samples"] == 64 and final["real_images"] == (load_digits().target < 4).sum()
    assert final["floor"]["samples"] == 64 and final["floor"]["real_images"] <= final["real_images"] / 2 + 4
    for metric in ("fd", "precision", "recall", "density", "coverage"):
        assert matrix[metric][0][1] is None and isinstance(judged["floor"][metric][1][0], float)
    assert final["fd"] > 10 * final["floor"]["fd"] and final["precision"] < final["floor"]["precision"]
    bins = matrix["loss_bins"]
    assert [len(bins[1][0]), len(bins[1][1]), len(judged["loss_before"][1])] == [4, 4, 4]
    assert judged["loss_before"][0] is None and judged["loss_before"][1] != bins[1][1]
    grown = [end - learnt for end, learnt in zip(bins[1][0], bins[0][0], strict=True)]
    assert final["forgetting_loss_bins"] == [pytest.approx(grown)] and final["loss_images"] == 18
    assert final["bpd"] == pytest.approx(final["bpd_prior"] + final["bpd_decoder"] + sum(final["bpd_terms"]))
    assert final["bpd_images"] == 12 and len(final["bpd_terms"]) == 7 and final["bpd_standard_error"] > 0
    assert final["nearest"]["buffer"]["learnt_images"] == 10  # of task 1, rehearsed while learning task 2
    assert final["nearest"]["training"]["learnt_images"] > 400 and "buffer" not in judged["after_task"][0]["nearest"]
    assert json.loads((place / "alone" / "metrics.json").read_text()) == judged


def test_two_ranks_measure_what_one_does(judged: dict[str, Any], pools: Pools, place: Path) -> None:
    main, other = pools[2].run("judge", root=str(place), name="two", settings=EVERYTHING, limit=280)
    assert other == {}
    one, two = flat(judged), flat(main)
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, float) and ("loss" in key or "bpd" in key):
            assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        elif isinstance(value, float):
            assert two[key] == pytest.approx(value, rel=0.02, abs=0.02), key  # a pixel may be rounded the other way
        else:
            assert two[key] == value, key


TAUGHT = [
    "method.name=generative_distillation",
    "evaluation.loss_images=0",
    "classifier.epochs=2",
    "classifier.batch=16",
]


@pytest.fixture(scope="module")
def taught(place: Path) -> dict[str, Any]:
    return judge(ALONE, str(place), "taught", TAUGHT)


def test_the_result_has_the_classifier_that_learns_the_tasks(taught: dict[str, Any]) -> None:
    final, matrix = taught["final"], taught["matrix"]["classifier_accuracy"]
    digits = load_digits().target
    assert matrix[0][1] is None and matrix[0][0] > 0.8
    assert final["forgetting_classifier_accuracy"] == pytest.approx(matrix[0][0] - matrix[1][0])
    assert final["classifier_accuracy"] == taught["after_task"][1]["classifier_accuracy"]
    counts = [after["classifier_images"] for after in taught["after_task"]]
    assert 0 < counts[0] < (digits < 2).sum() and counts[0] < counts[1] < (digits < 4).sum()
    assert final["classifier"]["epochs"] == 2 and "loss" not in final
    assert f"{100 * final['classifier_accuracy']:.1f} %" in plain_result(taught)


def test_two_ranks_teach_it_what_one_does(taught: dict[str, Any], pools: Pools, place: Path) -> None:
    main, other = pools[2].run("judge", root=str(place), name="taught-by-two", settings=TAUGHT, limit=280)
    assert other == {}
    for key in ("matrix", "final"):
        one, two = (
            {where: value for where, value in flat(content[key]).items() if "classifier" in where}
            for content in (taught, main)
        )
        assert one == pytest.approx(two, abs=0.05)  # a pixel of what is replayed may be rounded the other way


OWN = [
    *("method.name=finetune", "model.conditional=false", "model.classifier=joint", "evaluation.loss_images=0"),
    *("evaluation.probe_images=20", "evaluation.probe_timesteps=[0,300]", "evaluation.probe_neighbours=3"),
]


@pytest.fixture(scope="module")
def own(place: Path) -> dict[str, Any]:
    return judge(ALONE, str(place), "own", OWN)


def test_the_result_has_the_models_own_classifier_and_probes(own: dict[str, Any], place: Path) -> None:
    """The accuracy of the model of task 2 on task 1, by its logits of the classes learnt."""
    model, _, _ = load_teacher(RunDir(place / "own").teacher(2), "cpu")
    data = TaskData.open(place / "data", "test", [1], Verify.size)
    images = torch.from_numpy(data.read(np.arange(len(data)))).float() / 127.5 - 1.0
    with torch.no_grad():
        told = model.classify(images)[:, :4].argmax(dim=1).numpy()  # learnt are 0, 1, 2 and 3
    final, matrix = own["final"], own["matrix"]["model_accuracy"]
    assert matrix[1][0] == pytest.approx(np.mean(told == data.labels)) and matrix[0][1] is None
    assert final["average_accuracy"] == pytest.approx((matrix[1][0] + matrix[1][1]) / 2)
    assert final["backward_transfer"] == pytest.approx(matrix[1][0] - matrix[0][0])
    probe = final["probe"]
    assert (probe["timesteps"], probe["images"], probe["test_images"]) == ([0, 300], 80, 80)
    assert probe["linear"][0] > 0.7 and len(probe["knn"]) == 2  # features of fresh weights hold a lot of digits
    assert own["after_task"][0]["probe"]["images"] == 40


def test_two_ranks_ask_a_model_what_one_does(own: dict[str, Any], pools: Pools, place: Path) -> None:
    main, other = pools[2].run("judge", root=str(place), name="own-by-two", settings=OWN, limit=280)
    assert other == {}
    one, two = (
        {where: value for where, value in flat(content["final"]).items() if "model" in where or "probe" in where}
        for content in (own, main)
    )
    assert one == pytest.approx(two, abs=0.03) and len(one) > 8  # an image may lie on the edge between two classes


def test_rows_of_other_probes_are_made_again_and_the_log_tells_of_them(own: dict[str, Any], place: Path) -> None:
    assert own["final"]["probe"]["neighbours"] == 3
    config = load_config("digits", [f"data.root={place}/data", *SETTINGS, *OWN])
    run = RunDir(place / "own")
    same = open_judge(config, run, ALONE)
    assert not same._stale(2)
    for key, value in (("probe_images", 0), ("probe_timesteps", [0, 200]), ("probe_neighbours", 4)):
        changed = load_config("digits", [f"data.root={place}/data", *SETTINGS, *OWN])
        setattr(changed.evaluation, key, value)
        assert open_judge(changed, run, ALONE)._stale(2), key
    said, logged = [], []
    same.tracker = SimpleNamespace(note=said.append, log=lambda numbers, event: logged.append(numbers))  # pyright: ignore
    row = json.loads(run.evaluation(2).read_text())
    same._tell(2, row)
    assert f"its own classifier {100 * row['model_accuracy']:.1f} %" in said[0] and "linear probe" in said[0]
    assert logged[0]["model_accuracy"] == row["model_accuracy"]
    assert logged[0]["probe_knn_t300"] == row["probe"]["knn"][1]


def test_rows_of_other_settings_are_made_again(judged: dict[str, Any], place: Path) -> None:
    """Nothing is measured twice by the same settings; any difference, or an older row, is."""
    config = load_config("digits", [f"data.root={place}/data", *SETTINGS, *EVERYTHING])
    run = RunDir(place / "alone")
    same = open_judge(config, run, ALONE)
    kept = run.evaluation(1).stat().st_mtime_ns
    same.after(1)
    assert run.evaluation(1).stat().st_mtime_ns == kept
    for key, value in (("timestep_bins", 5), ("bpd_images", 0), ("loss_images", 4), ("eta", 0.5), ("samples", 66)):
        changed = load_config("digits", [f"data.root={place}/data", *SETTINGS, *EVERYTHING])
        setattr(changed.evaluation, key, value)
        assert open_judge(changed, run, ALONE)._stale(1), key
    row = json.loads(run.evaluation(1).read_text())
    text = json.dumps({key: value for key, value in row.items() if key != "extent"})
    run.evaluation(1).write_text(text)  # as a version without these measures left it
    same.after(1)
    assert flat(json.loads(run.evaluation(1).read_text())) == pytest.approx(flat(row))


def test_measures_can_be_left_out(place: Path) -> None:
    content = judge(ALONE, str(place), "little", ["evaluation.loss_images=0", "method.name=finetune"])
    assert "loss" not in content["final"] and "bpd" not in content["final"] and "loss_before" not in content
    assert content["final"]["nearest"] == {}
    text = plain_result(content)
    assert "precision" in text and "loss" not in text and "memorised" not in text


def test_the_table_prints_each_measure_beside_its_floor(judged: dict[str, Any]) -> None:
    text = plain_result(judged)
    rows = {cells[0].strip(): cells for line in text.splitlines() if len(cells := line.strip("|").split("|")) == 5}
    assert float(rows["precision"][1]) == pytest.approx(judged["final"]["precision"], abs=5e-4)
    assert float(rows["precision"][2]) == pytest.approx(judged["final"]["floor"]["precision"], abs=5e-4)
    assert f"64 against {judged['final']['real_images']}" in rows["FD"][3]
    assert "12 images" in rows["bits/dim"][3] and "18 images" in rows["loss"][3]
    assert float(rows["memorised, buffer"][1].strip(" %")) == pytest.approx(
        100 * judged["final"]["nearest"]["buffer"]["features"]["memorised"], abs=0.05
    )
    assert max(map(len, text.splitlines())) <= 100
