"""The weights of a teacher, damaged: refused by name, or loaded as the model on its card."""

from __future__ import annotations

import json

import torch

from tests.fuzz.conftest import Workplace
from tests.fuzz.mutate import amount, byte_mutants, settled
from trainer.data.shards import sha256_file
from trainer.models.teacher import CARD_NAME, WEIGHTS_NAME, load_teacher


@amount(120)
def test_weights_of_a_teacher(workplace: Workplace, count: int) -> None:
    """Even where the card vouches for the bytes."""
    directory = workplace.run.teacher(1)
    weights, card = directory / WEIGHTS_NAME, directory / CARD_NAME
    content, original = json.loads(card.read_bytes()), weights.read_bytes()
    head = 8 + int.from_bytes(original[:8], "little")
    for number, part in enumerate(byte_mutants(original[:head], count, seed=0)):
        data = part + original[head:]
        weights.write_bytes(data)
        card.write_text(json.dumps(content))
        if data != original:
            assert settled(lambda: load_teacher(directory, "cpu"), str(weights)) is None
        card.write_text(json.dumps(content | {"teacher_id": sha256_file(weights)}))
        loaded = settled(lambda: load_teacher(directory, "cpu"), str(weights))
        if loaded is not None and number % 10 == 0:
            assert all(tensor.dtype == torch.float32 for tensor in loaded[0].state_dict().values())
