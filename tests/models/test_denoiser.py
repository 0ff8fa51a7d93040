"""The denoiser on the image sizes of the shipped configs, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.denoiser import build_denoiser

SMALL = ModelConfig(channels=[8, 16], norm_groups=4)


@pytest.mark.parametrize(
    ("model", "size", "channels"),
    [
        (SMALL, 8, 1),
        (replace(SMALL, channels=[8, 8, 16]), 28, 1),
        (replace(SMALL, channels=[8, 8, 16, 16], attention_levels=[3]), 32, 3),
        (replace(SMALL, channels=[8, 8, 8, 16], layers_per_block=2, attention_levels=[1, 3]), 64, 3),
        (replace(SMALL, conditional=False, dropout=0.1), 8, 1),
    ],
)
def test_shapes_and_gradients(model: ModelConfig, size: int, channels: int) -> None:
    denoiser = build_denoiser(model, image_size=size, channels=channels, max_classes=5)
    x, t, label = torch.randn(2, channels, size, size), torch.tensor([0, 999]), torch.tensor([0, 4])
    prediction = denoiser(x, t, label)
    assert prediction.shape == x.shape and denoiser.conditional == model.conditional
    prediction.square().mean().backward()
    missing = [name for name, weight in denoiser.named_parameters() if weight.grad is None]
    assert missing == []
    assert all(name.startswith("unet.") for name in denoiser.state_dict())


def test_label_and_time_matter_to_a_conditional_model_only() -> None:
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([500])
    conditional = build_denoiser(SMALL, image_size=8, channels=1, max_classes=3)
    zero, one = (conditional(x, t, torch.tensor([label])) for label in (0, 1))
    assert not torch.equal(zero, one)
    assert not torch.equal(zero, conditional(x, t + 100, torch.tensor([0])))
    unconditional = build_denoiser(replace(SMALL, conditional=False), image_size=8, channels=1, max_classes=3)
    assert torch.equal(unconditional(x, t, torch.tensor([0])), unconditional(x, t, None))


def test_a_row_for_no_class_where_labels_are_dropped() -> None:
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([500])
    plain = build_denoiser(SMALL, image_size=8, channels=1, max_classes=3)
    dropping = build_denoiser(replace(SMALL, label_dropout=0.1), image_size=8, channels=1, max_classes=3)
    assert plain.null_label is None and dropping.null_label == 3
    rows = [model.state_dict()["unet.class_embedding.weight"].shape[0] for model in (plain, dropping)]
    assert rows == [3, 4]
    null, zero = (dropping(x, t, torch.tensor([label])) for label in (3, 0))
    assert not torch.equal(null, zero)
    unconditional = replace(SMALL, conditional=False, label_dropout=0.1)
    assert build_denoiser(unconditional, image_size=8, channels=1, max_classes=3).null_label is None


def test_computes_in_the_type_of_its_weights() -> None:
    denoiser = build_denoiser(SMALL, image_size=8, channels=1, max_classes=3)
    x, t, label = torch.randn(4, 1, 8, 8), torch.tensor([1, 20, 300, 900]), torch.tensor([0, 1, 2, 0])
    full = denoiser(x, t, label)
    half = denoiser.to(torch.bfloat16)(x, t, label)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.1 * float(full.detach().abs().max()))


def test_attention_where_asked() -> None:
    def attentions(model: ModelConfig) -> list[str]:
        denoiser = build_denoiser(model, image_size=8, channels=1, max_classes=3)
        return [name for name, module in denoiser.unet.named_modules() if type(module).__name__ == "Attention"]

    assert attentions(SMALL) == []
    names = attentions(replace(SMALL, attention_levels=[1]))
    assert any(name.startswith("down_blocks.1") for name in names) and any(name.startswith("mid") for name in names)
    assert any(name.startswith("up_blocks.0") for name in names)
    assert not any(name.startswith(("down_blocks.0", "up_blocks.1")) for name in names)


@pytest.mark.parametrize(
    ("change", "size", "key"),
    [
        ({"channels": []}, 8, "model.channels"),
        ({"channels": [8, 18]}, 8, "model.norm_groups"),
        ({"channels": [8, 0]}, 8, "model.channels"),
        ({"channels": [8, 8, 8, 8]}, 28, "data.image_size"),
        ({"attention_levels": [2]}, 8, "model.attention_levels"),
        ({"attention_levels": [0], "attention_head_dim": 3}, 8, "model.attention_head_dim"),
        ({"attention_levels": [0], "channels": [8, 12]}, 8, "model.attention_head_dim"),
        ({"layers_per_block": 0}, 8, "model.layers_per_block"),
        ({"dropout": 1.0}, 8, "model.dropout"),
        ({"norm_groups": 0}, 8, "model.norm_groups"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, object], size: int, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build_denoiser(replace(SMALL, **change), image_size=size, channels=1, max_classes=3)


def test_conditional_model_needs_classes() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_classes"):
        build_denoiser(SMALL, image_size=8, channels=1, max_classes=0)
