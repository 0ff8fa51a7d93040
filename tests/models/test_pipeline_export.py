"""The exported pipelines, loaded by diffusers alone in a process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from trainer.config import DiffusionConfig, ModelConfig, Prediction, Schedule
from trainer.diffusion.samplers import sample_path, timestep_grid
from trainer.errors import UserError
from trainer.models.denoiser import build_denoiser
from trainer.models.pipeline import export_pipeline
from trainer.models.teacher import load_teacher, save_teacher

MODEL = ModelConfig(channels=[8, 16], norm_groups=4)
STEPS = 10

CONSUMER = """
import json
import sys
sys.modules["trainer"] = None  # makes any import of it fail, installed or not
import numpy as np
import torch
from diffusers import DiffusionPipeline

directory, work = sys.argv[1:]
plain = DiffusionPipeline.from_pretrained(directory)
assert type(plain).__name__ == "DDIMPipeline", type(plain)
start = torch.from_numpy(np.load(work + "/start.npy", allow_pickle=False))
null = json.loads(open(directory + "/classes.json").read())["null_class"]
samples, guided = [], []
for custom in (directory, directory + "/pipeline.py"):
    pipeline = DiffusionPipeline.from_pretrained(directory, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipeline).__name__ == "ClassConditionalDDIMPipeline"
    arguments = dict(class_labels=[0, 3, 1], num_inference_steps=10)
    samples.append(pipeline(latents=start, output_type="pt", **arguments).images)
    guided.append(pipeline(latents=start, output_type="pt", guidance_scale=2.5, null_class=null, **arguments).images)
    try:
        pipeline(latents=start, guidance_scale=2.5, **arguments)
    except ValueError as error:
        assert "null_class" in str(error)
    else:
        raise AssertionError("guided without a null class")
    images = pipeline(generator=torch.Generator().manual_seed(0), eta=0.5, **arguments).images
    assert len(images) == 3 and images[0].size == (8, 8)
    array = pipeline(latents=start, output_type="np", return_dict=False, **arguments)[0]
    assert array.shape == (3, 8, 8, 1) and array.min() >= 0 and array.max() <= 1
assert torch.equal(*samples) and torch.equal(*guided)
np.save(work + "/samples.npy", torch.stack([samples[0], guided[0]]).numpy())
"""


def _teacher(directory: Path, model: ModelConfig, diffusion: DiffusionConfig, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = build_denoiser(model, image_size=8, channels=1, max_classes=4).state_dict()
    shape = {"image_size": 8, "channels": 1, "max_classes": 4}
    names = ["a", "b", "c", "d"]
    save_teacher(
        directory, weights, task=1, classes=[0, 3], model=model, diffusion=diffusion, class_names=names, **shape
    )
    return directory


def _ours(teacher: Path, start: torch.Tensor, label: torch.Tensor | None, guidance: float = 1.0) -> torch.Tensor:
    model, schedule, _ = load_teacher(teacher, "cpu")
    grid = timestep_grid(schedule.timesteps, STEPS)
    *_, last = sample_path(model, schedule, start, label, grid, guidance=guidance, null_label=model.null_label)
    return last.x_next


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("conditional", [True, False])
def test_same_samples_as_ours(tmp_path: Path, schedule: Schedule, prediction: Prediction, conditional: bool) -> None:
    diffusion = DiffusionConfig(schedule=schedule, prediction=prediction)
    teacher = _teacher(tmp_path / "teacher", replace(MODEL, conditional=conditional), diffusion)
    export_pipeline(tmp_path / "pipeline", teacher)
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    x = start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    label = torch.tensor([0, 3, 1]) if conditional else None
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            prediction_here = pipeline.unet(x, t, class_labels=label).sample
        x = pipeline.scheduler.step(prediction_here, t, x).prev_sample
    torch.testing.assert_close(_ours(teacher, start, label), x, rtol=0, atol=1e-4)


def test_unconditional_pipeline_samples_by_itself(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher", replace(MODEL, conditional=False), DiffusionConfig())
    export_pipeline(tmp_path / "pipeline", teacher)
    assert not (tmp_path / "pipeline/pipeline.py").exists()
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=3, generator=generator, num_inference_steps=STEPS, output_type="np").images
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = (_ours(teacher, start, None) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - ours).max() < 1e-4


def test_conditional_pipeline_runs_without_this_package(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher", replace(MODEL, label_dropout=0.1), DiffusionConfig())
    export_pipeline(tmp_path / "pipeline", teacher)
    assert json.loads((tmp_path / "pipeline/classes.json").read_text())["class_names"] == ["a", "b", "c", "d"]
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    np.save(tmp_path / "start.npy", start.numpy())
    (tmp_path / "consumer.py").write_text(CONSUMER)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "consumer.py", str(tmp_path / "pipeline"), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.from_numpy(np.load(tmp_path / "samples.npy", allow_pickle=False))
    for samples, guidance in zip(found, (1.0, 2.5), strict=True):
        ours = _ours(teacher, start, torch.tensor([0, 3, 1]), guidance)
        torch.testing.assert_close(ours, samples, rtol=0, atol=1e-4 * guidance)  # guidance amplifies rounding


def test_exporting_again_replaces_the_directory_whole(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    export_pipeline(target, _teacher(tmp_path / "one", MODEL, DiffusionConfig()))
    (target / "stale").touch()
    export_pipeline(target, _teacher(tmp_path / "two", replace(MODEL, conditional=False), DiffusionConfig(), seed=1))
    names = sorted(path.name for path in target.iterdir())
    assert names == ["classes.json", "model_index.json", "scheduler", "unet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pipeline", "two"]


def test_no_teacher_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card\.json"):
        export_pipeline(tmp_path / "pipeline", tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
