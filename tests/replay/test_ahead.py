"""A sampler that writes one shard while its device samples the next, and the teacher's fast forms."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from trainer.models.teacher import load_teacher
from trainer.replay import sidecar
from trainer.replay.graphs import GraphedPredict, fast_predict
from trainer.replay.sidecar import Sampler
from trainer.replay.teacher import open_teacher

CPU = torch.device("cpu")


def ahead(workplace: Any) -> Sampler:
    return Sampler(workplace.run, 0, 1, CPU, ahead=True)


def test_the_shards_are_those_of_one_that_does_not(workplace: Any) -> None:
    workplace.fill()
    expected = workplace.files()
    shutil.rmtree(workplace.run.replay(2))
    request, sampler = workplace.ask(), ahead(workplace)
    assert sampler.current_request() == request
    made = list[int]()
    while (shard := sampler.next_shard(request)) is not None:
        sampler.make_shard(request, shard)
        made.append(shard)
        assert len(workplace.files()) == len(made) - 1, "the last one is not written yet"
    sampler.finish_shard()
    assert made == list(range(len(expected))) and workplace.files() == expected


def test_a_shard_is_written_when_the_next_ones_first_micro_batch_is_under_way(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, written = ahead(workplace), list[int]()
    request = sampler.current_request()
    assert request is not None and request.shard_trajectories > request.sampler_batch
    sample = sidecar.sample_trajectories

    def sampled(*args: Any) -> Any:
        written.append(len(workplace.files()))
        return sample(*args)

    monkeypatch.setattr(sidecar, "sample_trajectories", sampled)
    sampler.make_shard(request, 0)
    sampler.make_shard(request, 1)
    assert written == [0, 0, 0, 1], "two micro-batches each"


def test_a_shard_is_not_lost_when_the_next_one_fails(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ahead(workplace)
    request = sampler.current_request()
    assert request is not None
    sampler.make_shard(request, 0)

    def fails(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(sidecar, "sample_trajectories", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        sampler.make_shard(request, 1)
    assert len(workplace.files()) == 1


def test_short_of_memory_the_graphs_are_dropped(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would keep what the smaller micro-batch needs."""
    sampler = workplace.sampler()
    request = sampler.current_request()
    model, schedule, _ = load_teacher(workplace.run.root / request.teacher, CPU)
    graphed, forgotten = GraphedPredict(model), list[int]()
    monkeypatch.setattr(graphed, "forget", lambda: forgotten.append(1))
    sample = sidecar.sample_trajectories

    def sampled(predict: Any, schedule: Any, request: Any, indices: Any, *rest: Any) -> Any:
        if len(indices) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, schedule, request, indices, *rest)

    monkeypatch.setattr(sidecar, "sample_trajectories", sampled)
    monkeypatch.setattr(sampler, "_open_teacher", lambda request: (graphed, schedule))
    sampler.make_shard(request, 0)
    assert forgotten and sampler.made == 1


def test_serving_ends_with_everything_written(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ahead(workplace)
    monkeypatch.setattr(sampler, "_rest", lambda request: sampler.stop.set())  # nothing is left to do
    sampler.serve()
    assert sampler.made == workplace.request.shards == len(workplace.files())


def test_a_shard_of_a_task_that_is_learnt_is_dropped(workplace: Any) -> None:
    sampler = ahead(workplace)
    request = sampler.current_request()
    assert request is not None
    sampler.make_shard(request, 0)
    assert sampler._pool is not None
    sampler._pool.task += 1
    sampler.finish_shard()
    assert not workplace.files() and sampler.next_shard(request) == 0


def test_a_disk_that_stays_full_holds_no_second_shard(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to stop while it waits for room, the sampler ends with what was published."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        sampler.stop.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sidecar, "publish", refuse)
    sampler = ahead(workplace)
    sampler.serve()
    assert sampler.made == 0 and not workplace.files()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_computes_in_the_precision_asked_for(workplace: Any, precision: str, dtype: torch.dtype) -> None:
    workplace.config.replay.precision = type(workplace.config.replay.precision)(precision)
    shutil.rmtree(workplace.run.replay(2))
    request = workplace.ask()
    teacher, _ = open_teacher(workplace.run, request, CPU)
    reference, _, _ = load_teacher(workplace.run.root / request.teacher, CPU)
    x, t = torch.randn(4, *request.image_shape), torch.tensor([0, 3, 20, 50])
    label = torch.tensor(request.classes[:2] * 2) if request.conditional else None
    found = teacher(x, t, label)
    assert found.dtype is dtype
    torch.testing.assert_close(
        found.float(), reference(x, t, label), rtol=0.05, atol=0.02 if precision == "bf16" else 0
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_teacher_predicts_the_same(workplace: Any) -> None:
    model, _, _ = load_teacher(workplace.run.root / workplace.request.teacher, CPU)
    x, t = torch.randn(4, *workplace.request.image_shape), torch.tensor([0, 3, 20, 50])
    label = torch.tensor(workplace.request.classes[:2] * 2)
    with torch.inference_mode():
        found = fast_predict(model, CPU, compiled=True)(x, t, label)
        torch.testing.assert_close(found, model(x, t, label), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_the_bits_of_the_call(workplace: Any) -> None:
    cuda = torch.device("cuda")
    model, _, _ = load_teacher(workplace.run.root / workplace.request.teacher, cuda)
    graphed = GraphedPredict(model)
    with torch.inference_mode():
        for batch in (4, 2, 4):
            x = torch.randn(batch, *workplace.request.image_shape, device=cuda)
            t = torch.randint(0, 60, (batch,), device=cuda)
            label = torch.full((batch,), workplace.request.classes[0], device=cuda)
            first = graphed(x, t, label)
            assert torch.equal(first, model(x, t, label))
            graphed(x + 1, t, label)
            assert torch.equal(first, model(x, t, label)), "an earlier result stays as it was"
