"""Shards that two teachers label themselves, with teachers whose images and classes are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.replay.conftest import tiny_config
from trainer.config import Config, MethodName, OwnClassifier, Placement
from trainer.data.batch import JointExamples
from trainer.diffusion.schedules import make_schedule
from trainer.errors import UserError
from trainer.kernels.philox import normal
from trainer.replay.decode import decode
from trainer.replay.labelled import Labeller, sample_labelled
from trainer.replay.points import gather, to_examples
from trainer.replay.pool import encode
from trainer.replay.request import ReplayRequest, plan_request
from trainer.replay.trajectory import trajectory_labels, trajectory_seeds

CPU = torch.device("cpu")
OLD, NEW = [7, 3], [5, 9]


def labelled_config(**jdcl: Any) -> Config:
    config = tiny_config(shard_trajectories=12, sampler_batch=8)
    config.data.tasks = [OLD, NEW]
    config.method.name, config.replay.placement = MethodName.jdcl, Placement.subprocess
    config.model.classifier, config.model.conditional = OwnClassifier.joint, False
    config.jdcl.candidates = 20.0
    for name, value in jdcl.items():
        assert hasattr(config.jdcl, name)
        setattr(config.jdcl, name, value)
    return config


def request_of(**jdcl: Any) -> ReplayRequest:
    return plan_request(labelled_config(**jdcl), 2, OLD, 20, teacher_id="old")


def classify(images: Tensor) -> Tensor:
    """Class 7 or 9 where the first pixel is bright, else 3 or 5: each with a logit that tells it, and 2 as a decoy."""
    bright = images[:, 0, 0, 0].float()
    logits = torch.zeros(len(images), 10)
    logits[:, [7, 9]] = bright[:, None]
    logits[:, [3, 5]] = -bright[:, None]
    logits[:, 2] = 5.0
    return logits


def half(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Half of all is taken for noise."""
    return 0.5 * x


def labeller(name: str, classes: list[int]) -> Labeller:
    return Labeller(name, f"tasks/2/{name}", half, classify, make_schedule(labelled_config().diffusion), classes)


TEACHERS = [labeller("old", OLD), labeller("local", NEW)]


def test_every_class_has_its_trajectories_of_images_that_look_like_it() -> None:
    request = request_of()
    made = sample_labelled(TEACHERS, request, 3, 8, CPU)
    assert made is not None
    (batch,) = made.batches
    wanted = trajectory_labels(request, np.arange(36, 48))
    assert batch.label.tolist() == wanted.tolist() and Counter(wanted.tolist()) == dict.fromkeys([*OLD, *NEW], 3)
    assert batch.end is not None
    bright = batch.end[:, 0, 0, 0] > 0
    assert bright.tolist() == [label in (7, 9) for label in batch.label.tolist()]
    assert made.lacking == {}
    assert batch.logits is not None
    torch.testing.assert_close(batch.logits.float(), classify(batch.end), rtol=1e-3, atol=1e-3)


def test_the_images_are_the_first_of_the_teachers_own_order_and_the_rest_is_counted() -> None:
    request, schedule = request_of(), TEACHERS[0].schedule
    made = sample_labelled(TEACHERS, request, 0, 8, CPU)
    assert made is not None
    (batch,) = made.batches
    rejected = evaluations = 0
    for name, classes in (("old", OLD), ("local", NEW)):
        seeds = trajectory_seeds(request, f"{name}-start", np.arange(80), CPU)
        # The predicted x_0 keeps the sign of the noise at every step, and so does the next state.
        bright = (normal(seeds, (1, 8, 8))[:, 0, 0, 0] > 0).tolist()
        first = {label: [row for row in range(80) if bright[row] == (label in (7, 9))][:3] for label in classes}
        for label, rows in first.items():
            assert batch.start_seeds[batch.label == label].tolist() == [int(seeds[row]) for row in rows]
        last = max(max(rows) for rows in first.values())
        sampled = 8 * (last // 8 + 1)
        rejected += sampled - 6
        evaluations += sampled * (request.steps + 1) + 6 * request.points_per_trajectory
    assert (made.rejected, batch.evaluations) == (rejected, evaluations)
    assert schedule.timesteps == 60


def test_no_two_shards_or_teachers_share_noise_and_a_shard_is_the_same_again() -> None:
    request = request_of()
    found = [sample_labelled(TEACHERS, request, shard, 8, CPU) for shard in (0, 1, 2, 1)]
    starts = [made.batches[0].start_seeds.tolist() for made in found if made is not None]
    seeds = [seed for start in starts[:3] for seed in start]
    assert len(set(seeds)) == len(seeds) == 36
    again = [encode(request, 1, made.batches)[1] for made in found[1::2] if made is not None]
    assert again[0] == again[1]


def test_stored_points_are_what_a_joint_model_learns_from() -> None:
    request = request_of()
    made = sample_labelled(TEACHERS, request, 1, 5, CPU)
    assert made is not None
    entry, data = encode(request, 1, made.batches)
    assert entry.bytes <= request.shard_bytes
    stored = decode(request, 1, data)
    rows, points = np.arange(12), np.tile(np.arange(3), 4)
    schedule = TEACHERS[0].schedule
    examples = to_examples(request, gather(request, [(rows, stored, rows, points)], 12), schedule, CPU, torch.float32)
    assert isinstance(examples, JointExamples)
    assert examples.noise is not None and examples.logits is not None
    signal, sigma = (table[examples.t][:, None, None, None] for table in (schedule.signal, schedule.sigma))
    torch.testing.assert_close(examples.x, signal * examples.view + sigma * examples.noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(examples.target, half(examples.x, examples.t, None), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(examples.logits.float(), classify(examples.view), rtol=2e-3, atol=2e-3)
    assert bool(examples.known.all()) and examples.label.tolist() == stored.label.tolist()


def never(images: Tensor) -> Tensor:
    """Of the teacher's two classes only the first, of which it is sure."""
    logits = torch.zeros(len(images), 10)
    logits[:, 7] = 3.0
    return logits


@pytest.mark.parametrize(("missing", "fill"), [("repeat", 7), ("other", 7)])
def test_a_class_that_is_not_made_any_more_is_filled_and_told(missing: str, fill: int) -> None:
    request = replace(request_of(), missing=missing, candidates=2.5)
    made = sample_labelled([replace(TEACHERS[0], classify=never), TEACHERS[1]], request, 0, 4, CPU)
    assert made is not None
    (batch,) = made.batches
    wanted = trajectory_labels(request, np.arange(12))
    assert batch.label[torch.from_numpy(wanted == 3)].tolist() == [fill] * 3
    assert made.lacking[3] == 3 and 5 not in made.lacking
    assert batch.evaluations >= 15 * (request.steps + 1), "2.5 for each of 6 trajectories were tried, and no more"
    if missing == "other":
        seeds = batch.start_seeds[batch.label == 7].tolist()
        assert len(set(seeds)) == len(seeds) == 6, "images that were rejected before take the free places"


def test_repeat_takes_images_of_the_class_itself_where_there_are_any() -> None:
    def rarely(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 10)
        logits[:, 7] = 1.0
        logits[0, 3] = 2.0  # the first of each micro-batch
        return logits

    request = replace(request_of(), candidates=1.0)
    made = sample_labelled([replace(TEACHERS[0], classify=rarely), TEACHERS[1]], request, 0, 6, CPU)
    assert made is not None and made.lacking[3] == 2
    (batch,) = made.batches
    threes = batch.start_seeds[batch.label == 3].tolist()
    assert len(threes) == 3 and len(set(threes)) == 1


def test_the_run_ends_where_a_missing_class_must_not_be() -> None:
    request = replace(request_of(), missing="fail", candidates=2.0)
    with pytest.raises(UserError, match=r"tasks/2/old: .*class 3: 3 more are needed \(jdcl.missing=fail"):
        sample_labelled([replace(TEACHERS[0], classify=never), TEACHERS[1]], request, 0, 4, CPU)


def test_every_evaluation_is_a_sign_of_life() -> None:
    request, beats = request_of(), list[int]()
    made = sample_labelled(TEACHERS, request, 0, 8, CPU, alive=lambda: beats.append(1))
    assert made is not None
    batches = 2 + sum(-(-found // 8) for found in (6, 6)) - 2  # micro-batches of the points of each teacher
    assert len(beats) >= request.steps * 2 + request.points_per_trajectory * batches


def test_it_stops_when_told_to() -> None:
    assert sample_labelled(TEACHERS, request_of(), 0, 4, CPU, lambda: True) is None
