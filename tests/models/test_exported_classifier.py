"""The classifier beside an exported pipeline, loaded by a process that cannot import this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import DiffusionConfig, ModelConfig, OwnClassifier
from trainer.models.denoiser import build_denoiser
from trainer.models.pipeline import export_pipeline
from trainer.models.teacher import save_teacher

CONSUMER = """
import sys
sys.modules["trainer"] = None  # makes any import of it fail, installed or not
directory, work = sys.argv[1:]
sys.path.insert(0, directory)
import numpy as np
import torch
from classifier import load_classifier
images = torch.from_numpy(np.load(work + "/images.npy", allow_pickle=False))
with torch.no_grad():
    np.save(work + "/logits.npy", load_classifier(directory)(images).numpy())
"""


@pytest.mark.parametrize("classifier", [OwnClassifier.joint, OwnClassifier.separate])
def test_it_says_what_the_model_says(tmp_path: Path, classifier: OwnClassifier) -> None:
    config = ModelConfig(
        channels=[8, 16], norm_groups=4, attention_levels=[1], conditional=False, classifier=classifier
    )
    torch.manual_seed(0)
    model = build_denoiser(config, image_size=8, channels=1, max_classes=5).eval()
    save_teacher(
        tmp_path / "teacher",
        {name: value.detach() for name, value in model.state_dict().items()},
        task=1,
        classes=[0, 1],
        model=config,
        diffusion=DiffusionConfig(),
        image_size=8,
        channels=1,
        max_classes=5,
        class_names=["a", "b", "c", "d", "e"],
    )
    export_pipeline(tmp_path / "pipeline", tmp_path / "teacher")
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", CONSUMER, str(tmp_path / "pipeline"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy", allow_pickle=False))
    torch.testing.assert_close(found, model.classify(images).detach(), rtol=0, atol=1e-6)
