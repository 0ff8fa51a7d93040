"""configs/imagenet100.yaml: what its comments promise, and a few steps of it, from the official tars to a result."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.shards import read_card
from trainer.plan import Plan, make_plan, size
from trainer.settings import check_world, load_config

from .conftest import Workplace, finish
from .zygote import ROOT

CONFIGS = ROOT / "configs"
LIST = CONFIGS / "imagenet100_classes.txt"
Launcher = Callable[[int], tuple[str, ...]]
TINY = (
    *("model.channels=[8,16]", "model.layers_per_block=1", "model.attention_levels=[]", "model.norm_groups=4"),
    *("data.image_size=16", "data.tasks=[[0,1,2,3,4,5,6,7,8,9],[10,11,12,13,14,15,16,17,18,19]]", "data.workers=1"),
    *("train.images_per_task=168", "train.global_batch=42", "train.precision=fp32", "train.log_every=1"),
    *("train.threads=1", "optimizer.warmup_images=42", "replay.precision=fp32", "replay.steps=2"),
    *("replay.points_per_trajectory=5", "replay.shard_trajectories=20", "replay.sampler_batch=20", "replay.pool_gb=1"),
    *("evaluation.samples=40", "evaluation.steps=2", "evaluation.classifier_epochs=1", "evaluation.grid_per_class=1"),
    *("evaluation.loss_images=0", "tracking.progress=false"),
)


@pytest.mark.parametrize(("name", "trainers"), [("imagenet100", 6), ("jdcl_imagenet100", 4)])
def test_the_numbers_in_the_comments_are_those_of_the_plan(name: str, trainers: int) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    plan: Plan = make_plan(load_config(f"{name}.yaml", []), 8, 8)
    task = plan.tasks[-1]
    assert plan.trainers == trainers and f"{trainers} trainers" in text
    numbers = [f"{task.steps:,} steps", f"{task.replay_points:,}", f"{task.teacher_evaluations:,} evaluations"]
    numbers += [size(plan.disk.replay_bytes), f"{size(plan.disk.total)} in all"]
    share = plan.replay_points_per_step // trainers
    evaluations = task.teacher_evaluations / task.replay_points * plan.replay_points_per_step
    joint = plan.images_per_step // trainers if name == "imagenet100" else 0  # jdcl: teachers' images alone
    numbers += [f"{share} ", f"{3 * (share + joint)} passes", f"{evaluations / (8 - trainers):.0f} evaluations"]
    comment = " ".join(text.replace("#", " ").split())
    assert all(number in comment for number in numbers), numbers


def test_the_global_batch_divides_as_the_comment_says() -> None:
    config = load_config("imagenet100.yaml", [])
    for trainers in (1, 2, 3, 4, 6, 7, 8, 9, 12, 14):
        check_world(config, trainers, cuda=True)
    assert config.train.images_per_task % config.train.global_batch == 0


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_imagenet(root: Path) -> None:
    """Four training images and one validation image of each listed class."""
    wnids = LIST.read_text().split()
    root.mkdir()
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": jpeg(10 * label + number) for number in range(4)})
        for label, wnid in enumerate(wnids)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    names = {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}
    images = {f"{name}.JPEG": jpeg(5000 + number) for number, name in enumerate(names)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(images))
    (root / "val_labels.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in names.items()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_few_steps_of_it_from_the_official_tars(workplace: Workplace, deepspeed: Launcher) -> None:
    """A trainer and the two teachers of the configuration, by the one command."""
    write_imagenet(workplace.path / "imagenet")
    data = ("data.source=imagenet", "data.source_path=imagenet", f"data.class_list={LIST}")
    line = [*deepspeed(3), str(ROOT / "launch" / "train.py"), "--config", "imagenet100.yaml", *data, *TINY]
    code, output = finish(workplace.spawn([*line, "run.name=imagenet"]), 800)
    assert code == 0, output
    result = workplace.metrics("imagenet")
    assert result["tasks"] == 2 and result["cost"]["replay_points_used"] == 168
    assert all(value is not None for value in result["matrix"]["fd"][1])
    (root,) = (workplace.path / "data").glob("imagenet100-16-*")
    card = read_card(root)
    assert card.classes == LIST.read_text().split() and [len(task) for task in card.tasks] == [10, 10]
