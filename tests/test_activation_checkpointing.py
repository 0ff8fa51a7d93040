"""Blocks that are computed again: the same gradients, and less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.units import Units

CALL = torch.tensor([5, 700]), torch.tensor([0, 4])


def make(dropout: float, recompute: bool) -> Denoiser:
    torch.manual_seed(2)
    config = ModelConfig(
        channels=[8, 16], norm_groups=4, attention_levels=[1], attention_head_dim=8, layers_per_block=2, dropout=dropout
    )
    model = build_denoiser(config, image_size=16, channels=3, max_classes=5)
    Units(model, gathered=False, recompute=recompute)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    """Of a step whose inputs and dropout masks are always the same ones."""
    torch.manual_seed(3)
    model(torch.randn(2, 3, 16, 16), *CALL).square().mean().backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def saved_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(2, 3, 16, 16), *CALL)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_gradients_bit_for_bit(dropout: float) -> None:
    expected, found = gradients(make(dropout, recompute=False)), gradients(make(dropout, recompute=True))
    assert len(found) == len(list(make(dropout, recompute=True).parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_only_the_inputs_of_blocks_are_kept() -> None:
    assert saved_bytes(make(0.0, recompute=True)) < saved_bytes(make(0.0, recompute=False)) / 4
