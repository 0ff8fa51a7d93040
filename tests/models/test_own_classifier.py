"""The classifier inside a denoiser, against diffusers' own forward pass and a plain computation of its features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.config import ModelConfig, OwnClassifier
from trainer.errors import ConfigError
from trainer.models.denoiser import Denoiser, build_denoiser

JOINT = ModelConfig(
    channels=[8, 16, 16],
    norm_groups=4,
    layers_per_block=2,
    attention_levels=[1],
    conditional=False,
    classifier=OwnClassifier.joint,
    classifier_width=12,
)


def build(classifier: OwnClassifier) -> Denoiser:
    torch.manual_seed(0)
    model = replace(JOINT, classifier=classifier)
    return build_denoiser(model, image_size=8, channels=1, max_classes=10).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    noisy, view = torch.randn(3, 1, 8, 8, generator=draw), torch.randn(5, 1, 8, 8, generator=draw)
    return noisy, torch.tensor([3, 500, 999]), view


@pytest.mark.parametrize("classifier", [OwnClassifier.joint, OwnClassifier.separate])
def test_one_pass_denoises_as_diffusers_does_and_classifies(classifier: OwnClassifier) -> None:
    model, (x, t, view) = build(classifier), inputs()
    prediction, logits = model(x, t, None, view)
    torch.testing.assert_close(prediction, model.unet(x, t).sample, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits, model.classify(view), rtol=0, atol=1e-6)
    assert logits.shape == (5, 10)


def test_features_are_the_means_of_all_maps_of_the_encoder() -> None:
    model, (x, t, _) = build(OwnClassifier.joint), inputs()
    maps: list[Tensor] = []
    unet = model.unet
    convolutions = [unet.conv_in]
    for block in unet.down_blocks:
        layers = zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)), strict=True)
        convolutions += [resnet if attention is None else attention for resnet, attention in layers]
        convolutions += list(block.downsamplers or [])
    handles = [part.register_forward_hook(lambda _m, _i, out: maps.append(out)) for part in convolutions]
    handles.append(unet.mid_block.register_forward_hook(lambda _m, _i, out: maps.append(out)))
    unet(x, t)
    for handle in handles:
        handle.remove()
    expected = torch.cat([plane.flatten(2).mean(2) for plane in maps], dim=1)
    torch.testing.assert_close(model.features(x, t), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classifier", "shared"), [(OwnClassifier.joint, True), (OwnClassifier.separate, False)])
def test_what_classifying_teaches_the_denoiser(classifier: OwnClassifier, shared: bool) -> None:
    model, (x, t, view) = build(classifier), inputs()
    _, logits = model(x, t, None, view)
    logits.square().sum().backward()
    assert (model.unet.conv_in.weight.grad is not None and bool(model.unet.conv_in.weight.grad.any())) is shared
    decoder = [weight.grad for weight in model.unet.up_blocks.parameters()]
    assert all(grad is None or not grad.any() for grad in decoder), "logits are not the decoder's business"


def test_a_classifier_changes_nothing_of_the_denoiser() -> None:
    plain, joint, separate = (build(kind) for kind in OwnClassifier)
    x, t, _ = inputs()
    assert torch.equal(plain(x, t), joint(x, t)) and torch.equal(plain(x, t), separate(x, t))
    assert set(plain.state_dict()) == {name for name in separate.state_dict() if name.startswith("unet.")}
    assert plain.head is None and len(separate.blocks()) > len(joint.blocks())


def test_computes_in_the_type_of_its_weights() -> None:
    model, (x, t, view) = build(OwnClassifier.joint), inputs()
    full = model(x, t, None, view)
    half = model.to(torch.bfloat16)(x, t, None, view)
    for wide, narrow in zip(full, half, strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.1 * float(wide.detach().abs().max()))


@pytest.mark.parametrize(
    ("change", "classes", "key"),
    [
        ({"conditional": True}, 10, "model.classifier"),
        ({}, 0, "model.max_classes"),
        ({"classifier_width": 0}, 10, "model.classifier_width"),
        ({"classifier_dropout": 1.0}, 10, "model.classifier_dropout"),
    ],
)
def test_impossible_classifiers_are_refused(change: dict[str, object], classes: int, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build_denoiser(replace(JOINT, **change), image_size=8, channels=1, max_classes=classes)
