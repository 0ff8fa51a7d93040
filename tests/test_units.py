"""Flat units against the model as it was, and the memory that gathered ones give back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from trainer.config import ModelConfig, OwnClassifier
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.units import ALIGNMENT, Units

BATCH = 3


def make_model() -> Denoiser:
    torch.manual_seed(0)
    config = ModelConfig(channels=[8, 12], attention_levels=[1], attention_head_dim=4, norm_groups=4)
    return build_denoiser(config, image_size=8, channels=1, max_classes=5)


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (BATCH,), generator=generator)
    return x, t, torch.randint(0, 5, (BATCH,), generator=generator)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x, t, label = inputs(seed)
    return (model(x, t, label) - x).square().mean()


def taken_apart(units: Units, vectors: list[Tensor]) -> dict[str, Tensor]:
    """What lies at each place of the vectors, by name."""
    return {
        name: vectors[place.unit][place.offset : place.offset + place.shape.numel()].view(place.shape)
        for name, place in units.places.items()
    }


def gradients(units: Units) -> list[Tensor]:
    found = [unit.flat.grad for unit in units.units]
    return [gradient for gradient in found if gradient is not None]


def test_every_weight_has_its_place() -> None:
    model = make_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    units = Units(model, gathered=False)
    assert list(units.places) == list(before), "in the module's order"
    assert len(units.units) == 1 + 2 + 1 + 2, "the rest, and the blocks down, in the middle and up"
    for name, weight in taken_apart(units, [unit.flat.detach() for unit in units.units]).items():
        torch.testing.assert_close(weight, before[name].detach(), atol=0, rtol=0)
    assert all(place.offset % ALIGNMENT == 0 for place in units.places.values())
    assert all(unit.flat.numel() % ALIGNMENT == 0 for unit in units.units), "also behind each other"
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"flat"}


@pytest.mark.parametrize("gathered", [False, True])
def test_the_model_computes_as_before(gathered: bool) -> None:
    """Twice before one backward pass, as a method may call it."""
    expected = make_model()
    (loss_of(expected) + loss_of(expected, seed=2)).backward()
    model = make_model()
    units = Units(model, gathered=gathered)
    loss = loss_of(model) + loss_of(model, seed=2)
    loss.backward()
    assert loss.item() == pytest.approx((loss_of(expected) + loss_of(expected, seed=2)).item(), abs=1e-6)
    found = taken_apart(units, gradients(units))
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_what_fills_the_gaps_is_not_trained() -> None:
    model = make_model()
    units = Units(model, gathered=False)
    loss_of(model).backward()
    for number, vector in enumerate(gradients(units)):
        gaps = torch.ones_like(vector, dtype=torch.bool)
        for place in units.places.values():
            if place.unit == number:
                gaps[place.offset : place.offset + place.shape.numel()] = False
        assert gaps.any() and not vector[gaps].any()


def test_gathered_vectors_can_be_freed_between_forward_and_backward() -> None:
    """As ZeRO-3 does: nothing that autograd keeps holds on to the vector, and a new one serves the backward pass."""
    expected = make_model()
    loss_of(expected).backward()
    model = make_model()
    units = Units(model, gathered=True)
    kept = [unit.flat.detach().clone() for unit in units.units]
    loss = loss_of(model)
    storages = [StorageWeakRef(unit.flat.untyped_storage()) for unit in units.units]
    for unit in units.units:
        unit.flat.data = torch.empty(0)
    assert all(storage.expired() for storage in storages)
    for unit, values in zip(units.units, kept, strict=True):
        unit.flat.data = values
    loss.backward()
    found = taken_apart(units, gradients(units))
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_shared_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(AssertionError, match="no weight is shared"):
        Units(model, gathered=False)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("classifier", [OwnClassifier.joint, OwnClassifier.separate])
def test_a_model_that_classifies_computes_the_same(classifier: OwnClassifier, gathered: bool) -> None:
    config = ModelConfig(channels=[8, 16], norm_groups=4, conditional=False, classifier=classifier)
    torch.manual_seed(0)
    model = build_denoiser(config, image_size=8, channels=1, max_classes=3).eval()
    x, t, view = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(4, 1, 8, 8)
    expected = model(x, t, None, view)
    Units(model, gathered=gathered)
    found = model(x, t, None, view)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    sum(part.square().sum() for part in found).backward()  # pyright: ignore
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())
