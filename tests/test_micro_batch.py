"""`train.micro_batch=auto`: what is tried, what is kept, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import micro_batch
from trainer.config import AUTO, Config, MethodName
from trainer.errors import ConfigError, UserError
from trainer.memory import names_the_key
from trainer.micro_batch import beside_bytes, choices, circumstances, find, largest_fitting, settle
from trainer.run import RunDir
from trainer.settings import as_plain, check_world, config_from_run, load_config, refused_changes, restore_config
from trainer.steps import fresh_model
from trainer.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
TINY = ["data.tasks=[[0,1],[2,3]]", "model.channels=[8]", "model.norm_groups=4", "train.micro_batch=auto"]


def tiny(*overrides: str) -> Config:
    return load_config("digits", [*TINY, *overrides])


class Limited(nn.Module):
    """A model that runs out of memory above `most` images at once, and notes how many it was given."""

    def __init__(self, config: Config, most: int, error: Exception, backward: bool = False) -> None:
        super().__init__()
        self.model, self.most, self.error, self.backward = fresh_model(config), most, error, backward
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) <= self.most:
            return self.model(x, t, label)
        if not self.backward:
            raise self.error
        prediction = self.model(x, t, label)
        prediction.register_hook(self.fail)
        return prediction

    def blocks(self) -> list[nn.Module]:
        return self.model.blocks()

    def fail(self, _: Tensor) -> None:
        raise self.error


# --- the key ----------------------------------------------------------------------------------------------------


def test_the_word_is_kept_and_read_again(tmp_path: Path) -> None:
    import yaml

    config, path = tiny(), tmp_path / "config.yaml"
    assert config.train.micro_batch == AUTO
    path.write_text(yaml.safe_dump(as_plain(config)))
    assert "micro_batch: auto" in path.read_text()
    assert config_from_run(path) == config
    assert refused_changes(restore_config(path), as_plain(load_config("digits", [*TINY, "train.micro_batch=8"]))) == []
    check_world(config, 4, cuda=False)


@pytest.mark.parametrize("value", ["-1", "-8", "Auto", "1.5", "[8]", "automatic"])
def test_anything_else_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch") as caught:
        load_config("digits", [f"train.micro_batch={value}"])
    assert "\n" not in str(caught.value)


# --- the search -------------------------------------------------------------------------------------------------


def test_choices_divide_images_and_replay_points() -> None:
    assert choices(tiny("train.global_batch=24", "train.images_per_task=24", "replay.batch=16"), 2) == [12, 6, 3]
    assert choices(tiny("train.global_batch=7", "train.images_per_task=7"), 1) == [7, 1]
    for choice in choices(config := tiny("train.global_batch=48", "replay.batch=24"), 2):
        config.train.micro_batch = choice
        check_world(config, 2, cuda=False)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")],
)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("overrides", "most", "tried", "found"),
    [
        (["replay.batch=32"], 26, [96, 48, 24, 24], 16),  # with half as many replay points beside the images
        (["method.name=finetune"], 26, [64, 32, 16, 16], 16),
        (["data.tasks=[[0,1]]"], 64, [64, 64], 64),  # a single task replays nothing
        (["method.name=experience_replay"], 2, [128, 64, 32, 16, 8, 4, 2, 2], 1),
    ],
)
def test_the_largest_that_goes_through(
    overrides: list[str], most: int, tried: list[int], found: int, backward: bool, error: Exception
) -> None:
    models: list[Limited] = []

    def build(config: Config) -> nn.Module:
        models.append(Limited(config, most, error, backward))
        return models[-1]

    config = tiny(*overrides)
    generator = torch.random.get_rng_state()
    assert largest_fitting(config, ALONE, build) == found
    assert [model.seen for model in models] == [tried]
    assert all(weight.grad is None for weight in models[0].parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_task_more_and_a_teacher_within_are_other_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one task replays nothing: what fitted then may not once a second task is appended."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    around = [
        circumstances(tiny(*overrides), ALONE)
        for overrides in (["data.tasks=[[0,1]]"], [], ["replay.placement=inline"])
    ]
    assert around[0] != around[1] and around[1] != around[2]


def test_a_model_that_fits_nowhere_is_told_of() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch=auto: the smallest .*train\.activation_checkpointing"):
        largest_fitting(tiny(), ALONE, lambda config: Limited(config, 0, MemoryError()))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        largest_fitting(tiny(), ALONE, lambda config: Limited(config, 8, RuntimeError("shapes do not match")))


def test_what_training_keeps_beside_the_model() -> None:
    """By hand, for 1,000 parameters on 4 ranks in bf16: masters, two moments, fp32 gradients, EMA, the bucket."""
    config = tiny("zero.stage=2", "train.precision=bf16", "ema.decay=0.9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "count_parameters", lambda config: 1000)
        assert beside_bytes(config, 4) == 4 * 250 * 5 + 2 * 1000
        config = tiny("zero.stage=0", "replay.placement=inline")
        assert beside_bytes(config, 4) == 4 * 2 * 1000 + 4 * 1000  # moments; the teacher


# --- the choice of a run ----------------------------------------------------------------------------------------


def test_a_cpu_takes_the_whole_share_and_says_so(tmp_path: Path) -> None:
    config, said = tiny(), list[str]()
    settle(config, RunDir(tmp_path), ALONE, said.append)
    assert config.train.micro_batch == 64
    assert said == ["train.micro_batch=auto: 64 of a rank's 64 images at once (a CPU takes them all)"]
    assert not list(tmp_path.iterdir())
    config.train.micro_batch = 8
    settle(config, RunDir(tmp_path), ALONE, said.append)
    assert config.train.micro_batch == 8 and len(said) == 1


def test_the_choice_is_kept_for_the_same_circumstances(tmp_path: Path) -> None:
    config, run = tiny(), RunDir(tmp_path)
    answers = iter([16, 4, 32])

    def choose(around: dict[str, Any]) -> int:
        return find(config, run, ALONE, around, lambda: next(answers))[0]

    card = {"device": "A", "memory": 80, "ranks": 1}
    assert [choose(card), choose(dict(card))] == [16, 16]
    assert choose(card | {"memory": 40}) == 4
    assert choose(card | {"memory": 40}) == 4
    run.micro_batch.write_text(json.dumps({"micro_batch": 5, "for": card}))  # divides nothing
    assert choose(card) == 32


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"micro_batch": true, "for": {}}', '{"micro_batch": -1, "for": {}}']
)
def test_a_damaged_note_is_searched_again(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    run.micro_batch.write_text(content)
    assert find(tiny(), run, ALONE, {}, lambda: 8) == (8, "the most that fit in a trial")


# --- in training ------------------------------------------------------------------------------------------------


def test_a_step_without_memory_names_the_key() -> None:
    @names_the_key
    def step(error: Exception) -> None:
        raise error

    with pytest.raises(UserError, match=r"CUDA out of memory.*train\.micro_batch.*activation_checkpointing") as caught:
        step(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes"):
        step(RuntimeError("shapes do not match"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_that_is_almost_full(tmp_path: Path) -> None:
    """Less than the whole share fits; the trial gives everything back, and what it found goes through again."""
    device = torch.device("cuda", torch.cuda.current_device())
    world = World(0, 1, device.index, device)
    settings = ["data.image_size=64", "data.channels=3", "model.channels=[64,128]", "train.global_batch=4096"]
    config = tiny(*settings, "train.images_per_task=4096", "model.norm_groups=32")
    config.method.name = MethodName.finetune
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = 4e9 + micro_batch.MARGIN * total
    assert free > room
    occupied = torch.empty(int(free - room), dtype=torch.uint8, device=device)
    before = torch.cuda.memory_allocated(device)
    settle(config, RunDir(tmp_path), world, lambda text: None)
    found = config.train.micro_batch
    assert 1 <= found < 4096
    assert torch.cuda.memory_allocated(device) < before + 1e8  # cuBLAS keeps a workspace
    with micro_batch.Trial(config, world, fresh_model) as trial:
        assert trial.fits(found)
        assert not trial.fits(4096)
    del occupied
