"""Run directories as finished runs of several tasks leave them, without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from trainer.config import Config, MethodName
from trainer.evaluation.forgetting import result
from trainer.run import RunDir
from trainer.settings import as_plain
from trainer.tracking.grid import pick_samples, save_samples

BINS = 6
COST = {
    "train_seconds": 75.2,
    "wall_seconds": 3725.0,
    "teacher_evaluations": 123456,
    "replay_points_used": 64000,
    "starved_seconds": 3.25,
    "images_per_second": 1234.5,
    "mfu": None,
}
MakeRun = Callable[..., RunDir]


def entry(draw: np.random.Generator, task: int, age: int, everything: bool) -> dict[str, Any]:
    """The measures of a task `age` tasks after it was learnt."""
    worse = 1.0 + 0.5 * age
    row: dict[str, Any] = {
        "task": task,
        "samples": 400,
        "fd": float(draw.uniform(5, 9) * worse),
        "accuracy": float(draw.uniform(0.8, 1.0) / worse),
        "share": float(draw.uniform(0.1, 0.3)),
    }
    if everything:
        shares = {key: float(draw.uniform(0.3, 1.0) / worse) for key in ("precision", "recall", "density", "coverage")}
        losses = (np.linspace(0.5, 0.01, BINS) * draw.uniform(0.8, 1.2, BINS) * worse).tolist()
        row |= shares | {"loss": float(np.mean(losses)), "loss_bins": losses, "bpd": float(draw.uniform(3, 5))}
    return row


LEVELS = [0, 10, 50, 100]


def own_classifier(draw: np.random.Generator, rows: list[dict[str, Any]]) -> None:
    """Adds what is measured of an unconditional model with a classifier."""
    for i, row in enumerate(rows, 1):
        for entry in row["tasks"]:
            entry |= {"model_accuracy": float(draw.uniform(0.9, 1.0) / (1 + i - entry["task"])), "model_images": 50}
        curve = np.array([0.9, 0.95, 0.8, 0.6]) / (1 + 0.1 * i)
        row["model_accuracy"] = float(np.mean([entry["model_accuracy"] for entry in row["tasks"]]))
        row["model_images"] = 50 * i
        row["probe"] = {
            **{"timesteps": LEVELS, "linear": curve.tolist(), "knn": (0.9 * curve).tolist()},
            **{"neighbours": 5, "images": 1200 * i, "test_images": 60 * i},
        }


def make_rows(tasks: int, seed: int = 0, everything: bool = True) -> list[dict[str, Any]]:
    """One evaluation after each task, with all measures or with those of the first version."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(1, tasks + 1):
        row: dict[str, Any] = {
            **entry(draw, 0, i, everything),
            "kld": float(draw.uniform(0, 1)),
            "samples": 2000,
            "evaluator": "e",
            "fd_reference": "test",
            "tasks": [entry(draw, j, i - j, everything) for j in range(1, i + 1)],
        }
        if everything:
            floor = {**entry(draw, 0, 0, False), "kld": 0.001, "precision": 0.7, "recall": 0.7, "density": 1.0}
            floors = [{**entry(draw, j, 0, True), "accuracy": 0.97} for j in range(1, i + 1)]
            near = {"distance": 1.5, "held_out_distance": 2.5, "memorised": 0.25 / i, "held_out_memorised": 0.125}
            row |= {
                "real_images": 900,
                "loss_images": 32 * i,
                "next_task": {"loss_bins": (np.linspace(0.9, 0.1, BINS)).tolist()} if i < tasks else None,
                "floor": floor | {"coverage": 0.9, "tasks": floors},
                **{"bpd_images": 24, "bpd_standard_error": 0.0625, "bpd_prior": 0.001, "bpd_decoder": 1.25},
                **{"bpd_terms": [1.0, 0.5, 0.25, 0.125], "bpd_edges": [1, 2, 10, 100, 1000]},
                "nearest": {"buffer": {"learnt_images": 77, "samples": 2000, "features": near, "pixels": near}},
            }
        rows.append(row)
    return rows


def log_lines(tasks: int, images: int) -> list[dict[str, Any]]:
    """What two logs of each task say; the first task has no replay."""
    return [
        {
            **{"time": 0.0, "event": "train", "task": task, "step": seen // 10, "seen": seen},
            **{"loss": 1.0 / (task + seen), "current": 0.5, **({"replay": 0.25} if task > 1 else {})},
            **{"images_per_second": 100.0, "replay_wait_seconds": 0.1 * task, "data_wait_seconds": 0.05},
        }
        for task in range(1, tasks + 1)
        for seen in (images // 2, images)
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A finished run of `tasks` tasks of two classes each, with all measures, or with `everything=False` with those of
    the first version and without a log, samples and real images; `classifying`: of a model with a classifier."""

    def make(
        name: str = "a-run",
        tasks: int = 3,
        *,
        everything: bool = True,
        classifying: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> RunDir:
        run = RunDir(tmp_path / name)
        config = Config()
        config.run.name, config.run.seed, config.method.name = name, seed, MethodName.generative_replay
        config.data.tasks = [[2 * task, 2 * task + 1] for task in range(tasks)]
        config.data.name, config.train.images_per_task = "stripes", 100
        rows = make_rows(tasks, seed, everything)
        if classifying:
            own_classifier(np.random.default_rng(seed), rows)
        content = result("generative_replay", rows, COST, seed=seed)
        if everything:
            content["replay"] = {"events": {"corrupt_shard": 3, "disk_full": 0}}
        run.root.mkdir(parents=True)
        run.metrics.write_text(json.dumps(content | changes))
        OmegaConf.save(OmegaConf.create(as_plain(config)), run.config)
        if everything:
            run.metrics_log.write_text("".join(json.dumps(line) + "\n" for line in log_lines(tasks, 100)))
            keep_samples(run, tasks)
        return run

    return make


def keep_samples(run: RunDir, tasks: int) -> None:
    labels = np.arange(2 * tasks)
    images = (labels * 20 % 256).astype(np.uint8)[:, None, None, None].repeat(8, axis=2).repeat(8, axis=3)
    for task in range(1, tasks + 1):
        shown = slice(0, 2 * task)
        picked = pick_samples(images[shown], labels[shown], labels[shown], labels[shown].tolist(), 1)
        save_samples(run.picked_samples(task), picked)
    save_samples(run.real_samples, pick_samples(images, labels, labels, labels.tolist(), 1))
