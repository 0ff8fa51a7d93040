"""Requests: refused where they cannot be served, and their estimate against what is really made."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainer.config import MethodName, OnStarved, Placement, Points, Solver, Timesteps
from trainer.errors import ConfigError, UserError
from trainer.replay.draws import draws
from trainer.replay.request import estimate, make_request, plan_request, read_request, write_request


def test_written_and_read_again(workplace: Any) -> None:
    assert read_request(workplace.run.replay_request(2)) == workplace.request
    write_request(workplace.run, replace(workplace.request, pool_bytes=10**9))  # may change between attempts


def test_numbers_of_the_request(workplace: Any) -> None:
    request = workplace.request  # 20 steps of 8 points, 18 points a shard
    assert (request.positions, request.shards, request.shard_points) == (160, 9, 18)
    assert estimate(request)["trajectories"] == 54 and estimate(request)["evaluations"] == 54 * 7


def test_a_guided_step_evaluates_twice_and_makes_another_pool(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(label_dropout=0.1)
    plain = workplace.request
    assert (plain.guidance, plain.null_label) == (1.0, -1)
    workplace.config.replay.guidance = 2.0
    guided = plan_request(workplace.config, 2, plain.classes, 20, teacher_id=plain.teacher_id)
    assert (guided.guidance, guided.null_label) == (2.0, 10)
    assert estimate(guided)["evaluations"] == 54 * (2 * 4 + 3)
    assert guided.sampler() != plain.sampler()
    with pytest.raises(UserError, match=r"made with guidance=1\.0, the run now asks for 2\.0"):
        write_request(workplace.run, guided)


def test_in_the_loop_each_point_has_its_trajectory(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(placement=Placement.inline)
    cost = estimate(workplace.request)
    assert cost == {"shards": 0, "trajectories": 160, "points": 160, "bytes": 0, "disk_bytes": 0, "evaluations": 800}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"points": Points.trajectory},
        {"points": Points.both},
        {"points": Points.both, "points_per_trajectory": 1},
        {"points": Points.both, "points_per_trajectory": 6},
        {"method": MethodName.generative_replay},
    ],
)
def test_no_shard_is_larger_than_estimated(make_workplace: Callable[..., Any], settings: dict[str, Any]) -> None:
    workplace = make_workplace(**settings)
    workplace.fill(2)
    sizes = [len(data) for data in workplace.files().values()]
    assert len(sizes) == 2 and max(sizes) <= workplace.request.shard_bytes <= 1.2 * max(sizes)


@pytest.mark.parametrize(
    ("points", "count", "on_path", "evaluations"),
    [
        (Points.renoised, 3, 0, 4 + 3),
        (Points.trajectory, 3, 3, 4),
        (Points.both, 1, 1, 4),
        (Points.both, 2, 1, 4 + 1),
        (Points.both, 3, 2, 4 + 1),
        (Points.both, 6, 3, 4 + 3),
    ],
)
def test_points_of_each_kind_and_what_they_cost(
    make_workplace: Callable[..., Any], points: Points, count: int, on_path: int, evaluations: int
) -> None:
    request = make_workplace(points=points, points_per_trajectory=count).request
    assert (request.path_points, request.renoised_points) == (on_path, count - on_path)
    assert request.evaluations_per_trajectory == evaluations
    assert estimate(request)["evaluations"] == request.shards * 6 * evaluations


def test_what_shapes_the_points_makes_another_pool(workplace: Any) -> None:
    for name, value in (("points", Points.both), ("solver", Solver.dpmpp), ("timesteps", Timesteps.stratified)):
        config = deepcopy(workplace.config)
        setattr(config.replay, name, value)
        other = plan_request(config, 2, workplace.request.classes, 20, teacher_id=workplace.request.teacher_id)
        with pytest.raises(UserError, match=f"made with {'stratified' if name == 'timesteps' else name}="):
            write_request(workplace.run, other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"solver": "euler"}, "solver=euler"),
        ({"solver": "dpmpp", "eta": 0.5}, "eta=0.5"),
        ({"points": "neither"}, "points=neither"),
        ({"points": "trajectory", "points_per_trajectory": 4}, "points_per_trajectory=4"),
        ({"points": "both", "points_per_trajectory": 7}, "points_per_trajectory=7"),
        ({"points": "both", "targets": "noise"}, "targets=noise"),
        ({"schema": 4}, "schema 5"),
    ],
)
def test_an_impossible_request_is_named(workplace: Any, changes: dict[str, Any], named: str) -> None:
    path = workplace.run.replay_request(2)
    stored = json.loads(path.read_bytes())
    assert read_request(path).eta == 0.0
    path.write_text(json.dumps(stored | changes))
    with pytest.raises(UserError, match=f"{path}: .*{named}"):
        read_request(path)


def test_another_pool_is_refused_with_the_file(workplace: Any) -> None:
    path = str(workplace.run.replay_request(2))
    for change in ({"teacher_id": "f" * 64}, {"steps": 5}, {"seed": 1}):
        with pytest.raises(UserError, match=f"{path}: .*{next(iter(change))}"):
            write_request(workplace.run, replace(workplace.request, **change))


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "unreadable"), ("[]", "schema"), ('{"schema": 4}', "task"), (None, "steps"), ("extra", "unknown key")],
)
def test_a_damaged_request_is_named(workplace: Any, content: str | None, word: str) -> None:
    path = workplace.run.replay_request(2)
    stored = json.loads(path.read_bytes())
    if content is None:
        content = json.dumps(stored | {"steps": "four"})
    elif content == "extra":
        content = json.dumps(stored | {"extra": 1})
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: .*{word}"):
        read_request(path)


def test_a_teacher_of_something_else_is_refused(workplace: Any) -> None:
    for change in ({"task": 2}, {"classes": [1, 2]}, {"image_size": 16}):
        with pytest.raises(UserError, match=rf"card.json: {next(iter(change))} is"):
            make_request(workplace.config, workplace.run, 2, [7, 3, 5], replace(workplace.card, **change), 20)


def test_a_pool_too_small_is_refused_with_the_key(workplace: Any) -> None:
    config, size = workplace.config, workplace.request.shard_bytes
    config.replay.pool_gb = 0.9 * size / 1e9
    with pytest.raises(ConfigError, match=r"replay.pool_gb=.* one shard"):
        plan_request(config, 2, [1], 20)
    config.replay.pool_gb = 5.5 * size / 1e9  # a checkpoint every 5 steps: 40 points, 3 shards, and 3 to spare
    with pytest.raises(ConfigError, match=r"replay.pool_gb=.* holds 5 shards, 6 are needed"):
        plan_request(config, 2, [1], 20)
    config.replay.pool_gb = 6.5 * size / 1e9
    assert plan_request(config, 2, [1], 20).capacity == 6
    config.replay.on_starved = OnStarved.reuse
    with pytest.raises(ConfigError, match="9 are needed"):
        plan_request(config, 2, [1], 20)


def test_impossible_combinations_are_refused(workplace: Any) -> None:
    config = workplace.config
    config.replay.points, config.replay.points_per_trajectory = Points.trajectory, 4
    with pytest.raises(ConfigError, match=r"replay.points_per_trajectory=4"):
        plan_request(config, 2, [1], 20)
    config.replay.points, config.replay.points_per_trajectory = Points.both, 7
    with pytest.raises(ConfigError, match=r"replay.points_per_trajectory=7: 4 of them"):
        plan_request(config, 2, [1], 20)
    config.replay.points_per_trajectory, config.method.name = 3, MethodName.generative_replay
    with pytest.raises(ConfigError, match=r"replay.points=both"):
        plan_request(config, 2, [1], 20)
    config.replay.points = Points.trajectory
    with pytest.raises(ConfigError, match=r"replay.points=trajectory"):
        plan_request(config, 2, [1], 20)


@pytest.mark.parametrize("reuse", [1, 3])
def test_draws_use_every_point_as_often_as_asked_and_in_any_cut(make_workplace: Callable[..., Any], reuse: int) -> None:
    request = make_workplace(reuse=reuse).request
    shard, trajectory, point = draws(request, 0, 2 * request.shard_uses)
    assert (shard == np.repeat([0, 1], 18 * reuse)).all() and (trajectory // 6 == shard).all()
    pairs, counts = np.unique(trajectory * 3 + point, return_counts=True)
    assert len(pairs) == 36 and (counts == reuse).all()
    for start in range(0, 2 * request.shard_uses, 18):  # each pass over a shard is complete, and shuffled
        passed = (trajectory * 3 + point)[start : start + 18]
        assert len(set(passed)) == 18 and (np.diff(passed) < 0).any()
    assert reuse == 1 or not np.array_equal(trajectory[:18], trajectory[18:36])
    for size in (1, 2, 4):  # ranks of a world of any size, together, draw the same
        cut = [
            np.concatenate(parts)
            for parts in zip(*(draws(request, s, s + size) for s in range(0, 36, size)), strict=True)
        ]
        assert np.array_equal(cut[1], trajectory[:36]) and np.array_equal(cut[2], point[:36])


def test_a_request_from_before_there_were_labelled_pools_is_read(workplace: Any) -> None:
    path = workplace.run.replay_request(2)
    younger = ("local_teacher", "local_teacher_id", "local_classes", "outputs", "candidates", "missing")
    stored = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: value for key, value in stored.items() if key not in younger}))
    assert read_request(path) == workplace.request
    assert not set(younger) & workplace.request.sampler().keys(), "shards of such a pool are those asked for"
