"""Task shards in a store: the same batches as from files, from a cache that checks what it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_tools.build import build
from data_tools.spec import BuildSpec
from data_tools.upload import upload
from trainer.config import Config, DataConfig, Verify
from trainer.data import remote
from trainer.data.dataset import TaskData
from trainer.data.remote import local_root, open_tasks
from trainer.data.shards import DATASET_NAME, read_card
from trainer.data.stream import RealStream
from trainer.errors import ConfigError, UserError
from trainer.idle import check_idle
from trainer.preflight import prepare_data
from trainer.settings import check

URL = "memory://bucket/digits"
TASKS = [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the digits, in shards of 100."""
    path = tmp_path_factory.mktemp("digits") / "root"
    build(BuildSpec("digits", "digits", TASKS, 8, 1, shard_size=100), path, progress=False)
    return path


@pytest.fixture
def data(root: Path, tmp_path: Path) -> Iterator[DataConfig]:
    """Settings of the same data set in a store, with a cache of its own."""
    remote._remote_set.cache_clear()
    upload(root, URL, progress=False)
    yield DataConfig(
        root=URL, cache_dir=str(tmp_path / "cache"), shard_size=100, tasks=TASKS, store_timeout=2.0, request_timeout=1.0
    )
    remote._remote_set.cache_clear()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def stored(name: str) -> str:
    return f"/bucket/digits/{name}"


def batches(data: TaskData, steps: int = 30) -> list[Any]:
    options: dict[str, Any] = {"seed": 3, "task": 1, "global_batch": 16, "rank": 0, "world_size": 1}
    with RealStream(data, **options, start_step=0, stop_step=steps, workers=2, prefetch=3) as stream:
        return [(batch.images.numpy().copy(), batch.labels.numpy(), batch.keys, batch.draws) for batch in stream]


def test_batches_are_those_of_the_files_to_the_bit(data: DataConfig, root: Path) -> None:
    local = TaskData.open(root, "train", [1, 2], Verify.sha256)
    there = open_tasks(data, "train", [1, 2])
    there.fetch_ahead()
    for mine, other in zip(batches(local), batches(there), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
    assert read_card(local_root(data)) == read_card(root)


def test_a_second_process_reads_the_cache(data: DataConfig) -> None:
    first = batches(open_tasks(data, "train", [1]), 3)
    for name in fsspec.filesystem("memory").find("/bucket"):
        if name.endswith(".tar"):
            fsspec.filesystem("memory").pipe_file(name, bytes(fsspec.filesystem("memory").size(name)))
    remote._remote_set.cache_clear()
    again = batches(open_tasks(data, "train", [1]), 3)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_a_damaged_cached_shard_is_fetched_again(data: DataConfig) -> None:
    first = batches(open_tasks(data, "train", [1]), 12)
    for path in (Path(data.cache_dir) / "shards").iterdir():
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    again = batches(open_tasks(data, "train", [1]), 12)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_in_the_store_is_one_line_with_the_object(data: DataConfig, how: str) -> None:
    name, system = "train/task-01/train-01-00001.tar", fsspec.filesystem("memory")
    content = bytearray(system.cat_file(stored(name)))
    content[700] ^= 1
    if how == "gone":
        system.rm_file(stored(name))
    else:
        system.pipe_file(stored(name), bytes(content if how == "flip" else content[:-512]))
    wanted = {"flip": "corrupt", "cut": "bytes, .* expected", "gone": "missing"}[how]
    with pytest.raises(UserError, match=f"^{URL}/{name}: .*{wanted}.*key data.root"):
        batches(open_tasks(data, "train", [1]))


def test_what_a_configuration_wants_must_be_there(data: DataConfig) -> None:
    config = Config(data=data)
    assert prepare_data(config, progress=False).tasks == TASKS
    data.tasks = [*TASKS, [4, 5]]
    with pytest.raises(UserError, match=r"holds 2 tasks, 3 are wanted"):
        prepare_data(config, progress=False)
    data.tasks, data.shard_size = TASKS, 99
    with pytest.raises(ConfigError, match=r"^memory://bucket/digits: .*data.shard_size"):
        prepare_data(config, progress=False)
    data.root = "memory://bucket/nothing"
    with pytest.raises(UserError, match=rf"^memory://bucket/nothing/{DATASET_NAME}: missing; key data.root"):
        prepare_data(config, progress=False)


def test_a_cache_that_holds_no_task_is_refused(data: DataConfig) -> None:
    data.cache_gb = 1e-4
    with pytest.raises(UserError, match=r"^data\.cache_gb=0\.0001: .* read together"):
        open_tasks(data, "train", [1])


def test_an_interrupted_data_set_waits_for_nothing(data: DataConfig) -> None:
    opened = open_tasks(data, "train", [1])
    opened.interrupt()
    with pytest.raises(UserError, match="given up"):
        opened.read(np.array([0]))


def test_uploading_again_sends_what_is_missing_and_never_replaces_another(data: DataConfig, root: Path) -> None:
    fsspec.filesystem("memory").rm_file(stored("test/task-02/test-02-00000.tar"))
    sent = upload(root, URL, progress=False)
    assert (sent.shards, sent.kept) == (1, len(list(root.rglob("*.tar"))) - 1)
    fsspec.filesystem("memory").pipe_file(stored("train/task-01/index.json"), b"{}")
    with pytest.raises(UserError, match=f"^{URL}/train/task-01/index.json: of another data set"):
        upload(root, URL, progress=False)


def test_keys_of_stores_do_nothing_without_one() -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_gb has no effect"):
        check_idle(Config(), ["data.cache_gb=3"])
    config = Config()
    config.data.root = "s3://user:SECRET@bucket"
    with pytest.raises(ConfigError, match=r"^data\.root=s3://bucket") as caught:
        check(config)
    assert "SECRET" not in str(caught.value)
    config.data.root, config.replay.store = "", "bucket/prefix"
    with pytest.raises(ConfigError, match=r"^replay\.store=bucket/prefix"):
        check(config)
