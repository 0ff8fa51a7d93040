from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import sampling
from trainer.config import DiffusionConfig, ModelConfig, Solver
from trainer.errors import UserError
from trainer.models.denoiser import build_denoiser
from trainer.models.teacher import save_teacher
from trainer.run import RunDir
from trainer.sampling import Request, newest_task, sample, tile


def publish(root: Path, task: int, *, channels: int = 1, scale: float = 1.0, **model_settings: Any) -> None:
    model = ModelConfig(channels=[8, 16], **model_settings)
    torch.manual_seed(task)
    weights = build_denoiser(model, image_size=8, channels=channels, max_classes=4).state_dict()
    save_teacher(
        RunDir(root).teacher(task),
        {name: weight * scale for name, weight in weights.items()},
        task=task,
        classes=[1, 3][:task],
        model=model,
        diffusion=DiffusionConfig(timesteps=20),
        image_size=8,
        channels=channels,
        max_classes=4,
        class_names=list("abcd"),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for task in (1, 2):
        publish(tmp_path / "run", task)
    return tmp_path / "run"


def request(run: Path, **changes: object) -> Request:
    base = Request(run, run.parent / "out", count=5, steps=3, device="cpu")
    return replace(base, **changes)  # type: ignore[arg-type]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_the_command_takes_the_solver_that_it_is_given(run: Path) -> None:
    main = runpy.run_path(str(Path(sampling.__file__).parent.parent / "launch" / "sample.py"))["main"]
    options = ["--run", str(run), "--count", "2", "--steps", "5", "--device", "cpu"]
    assert main([*options, "--out", str(run / "a"), "--solver", "dpmpp"]) == 0
    assert main([*options, "--out", str(run / "b")]) == 0
    for name, solver in (("a", Solver.dpmpp), ("b", Solver.ddim)):
        expected = sample(request(run, out=run / solver.value, count=2, steps=5, solver=solver))
        for path in expected:
            assert np.array_equal(pixels(run / name / path.name), pixels(path))
    assert not np.array_equal(pixels(run / "a" / "grid.png"), pixels(run / "b" / "grid.png"))
    with pytest.raises(UserError, match=r"--solver: invalid choice: 'euler'"):
        main([*options, "--out", str(run / "c"), "--solver", "euler"])


def test_one_png_per_image_named_by_class_and_a_grid(run: Path) -> None:
    paths = sample(request(run))
    names = [f"000{i}-class{label}.png" for i, label in enumerate([1, 3, 1, 3, 1])]
    assert [path.name for path in paths] == [*names, "grid.png"]
    assert all(pixels(path).shape == (8, 8) for path in paths[:-1])
    images = np.stack([pixels(path) for path in paths[:-1]])
    assert len({image.tobytes() for image in images}) == 5
    by_class = images[[0, 2, 4, 1, 3]][:, None]
    assert np.array_equal(pixels(paths[-1]), tile(by_class)[0])


def test_an_image_depends_on_seed_and_index_not_on_the_count(run: Path) -> None:
    few = [pixels(path) for path in sample(request(run, count=2))[:-1]]
    more = [pixels(path) for path in sample(request(run, count=4, out=run.parent / "more"))[:-1]]
    other = [pixels(path) for path in sample(request(run, count=2, seed=1, out=run.parent / "other"))[:-1]]
    # The width of a batch may change a sum's last bit, and so a rounding.
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(few, more, strict=False))
    assert all(np.abs(a.astype(int) - b).max() > 10 for a, b in zip(few, other, strict=True))


def test_guidance_where_the_model_can_be_guided(run: Path) -> None:
    with pytest.raises(UserError, match=r"--guidance 3: this model was not trained with model\.label_dropout"):
        sample(request(run, guidance=3.0))
    publish(run, 3, label_dropout=0.1)
    plain, guided = (
        [pixels(path) for path in sample(request(run, guidance=scale, out=run.parent / str(scale)))[:-1]]
        for scale in (1.0, 3.0)
    )
    assert any(np.abs(a.astype(int) - b).max() > 10 for a, b in zip(plain, guided, strict=True))


def test_the_newest_task_unless_another_is_asked_for(run: Path) -> None:
    assert newest_task(RunDir(run)) == 2
    assert [path.name for path in sample(request(run, task=1, count=2))][:2] == ["0000-class1.png", "0001-class1.png"]


def test_chosen_classes(run: Path) -> None:
    assert sample(request(run, classes=(3,), count=1))[0].name == "0000-class3.png"


def test_an_unconditional_colour_model(tmp_path: Path) -> None:
    publish(tmp_path / "run", 1, conditional=False, channels=3)
    paths = sample(request(tmp_path / "run", count=2))
    assert [path.name for path in paths] == ["0000.png", "0001.png", "grid.png"]
    assert pixels(paths[0]).shape == (8, 8, 3)
    with pytest.raises(UserError, match="--classes"):
        sample(request(tmp_path / "run", classes=(1,)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": (2,)}, "--classes 2"),
        ({"task": 3}, r"tasks/3/teacher/card\.json"),
        ({"steps": 21}, "--steps 21"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "nonsense"}, "--device nonsense"),
    ],
)
def test_what_is_not_there_is_named(run: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sample(request(run, **changes))
    assert not (run.parent / "out").exists()


def test_a_run_without_a_finished_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run .*nothing"):
        sample(request(tmp_path / "nothing"))


def test_tiles_stand_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 32, 32), dtype=np.uint8)
    canvas = tile(images, gap=1)[0]
    assert canvas.shape == (65, 98)
    assert [canvas[0, 0], canvas[0, 33], canvas[0, 66], canvas[33, 0], canvas[33, 33]] == [0, 1, 2, 3, 4]
    assert canvas[0, 32] == canvas[32, 0] == canvas[33, 66] == 255
