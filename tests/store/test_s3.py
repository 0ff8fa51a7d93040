"""Shards and pool at a real S3 server: the same weights, also when it dies and returns; what is wrong is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.store.conftest import BUCKET, Workplace, finish
from tests.store.s3 import S3Server
from trainer.errors import UserError
from trainer.replay.events import read_events
from trainer.run import RunDir
from trainer.store import Missing, ObjectStore, Patience

pytestmark = [pytest.mark.store, pytest.mark.timeout(900)]
POOL = f"replay.store=s3://{BUCKET}/pools"


@pytest.fixture(scope="session")
def expected(workplace: Workplace, url: str) -> str:
    """The final weights of a run whose shards and pool are files."""
    local = workplace.start(*_local_command())
    finish(local, 600)
    return workplace.teacher_id("local")


def _local_command() -> list[str]:
    from tests.store.conftest import ROOT, TASKS

    train = str(ROOT / "launch" / "train.py")
    return [train, "--config", "tiny.yaml", TASKS, "run.name=local", "data.root=digits"]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what: Path, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what.exists():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)


def test_objects_at_a_real_server(s3: S3Server) -> None:
    store = ObjectStore(f"s3://{BUCKET}/unit", Patience(20.0, 10.0))
    large = bytes(range(256)) * (1 << 17)  # two requests
    store.write("a/one", b"1")
    store.write("a/large", large)
    assert store.read("a/one") == b"1" and store.sizes("a") == {"one": 1, "large": len(large)}
    got: list[bytes] = []
    store.fetch("a/large", len(large), got.append)
    assert b"".join(got) == large and len(got) == 2
    store.delete("a/one")
    store.delete("a/one")
    assert store.sizes("a") == {"large": len(large)} and store.sizes("b") == {}
    with pytest.raises(Missing, match="unit/a/one: missing"):
        store.read("a/one")
    with pytest.raises(UserError, match=r"bytes, .* expected"):
        store.fetch("a/large", len(large) + 10, lambda data: None)


def test_a_server_that_dies_or_hangs_ends_a_read_in_time(s3: S3Server) -> None:
    store = ObjectStore(f"s3://{BUCKET}/unit", Patience(3.0, 2.0))
    store.write("one", b"1")
    s3.freeze()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"unit/one: the store has not answered .*data.request_timeout=2"):
        store.read("one")
    assert time.monotonic() - began < 3 + 2 * 2 + 3  # the limit, a request begun before it, and the tries' pauses
    s3.freeze(False)
    assert store.read("one") == b"1"
    s3.kill()
    began = time.monotonic()
    with pytest.raises(UserError, match="unit/one: the store has not answered"):
        store.read("one")
    assert time.monotonic() - began < 8
    s3.start()
    assert store.read("one") == b"1"


@pytest.mark.parametrize(
    ("root", "environment", "said"),
    [
        ("digits", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "digits/dataset.json: refused"),
        ("digits", {"AWS_ACCESS_KEY_ID": "unknown"}, "digits/dataset.json: refused"),
        ("nothing", {}, "nothing/dataset.json: missing"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_first_step(
    workplace: Workplace, url: str, root: str, environment: dict[str, str], said: str
) -> None:
    process = workplace.train(f"data.root=s3://{BUCKET}/{root}", "run.name=wrong", **environment)
    _, output = finish(process, code=2)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and said in errors[0], output
    assert not (workplace.path / "runs" / "wrong" / "config.yaml").exists()
    assert "wrong" not in errors[0] and workplace.environment["AWS_SECRET_ACCESS_KEY"] not in output


def test_a_missing_bucket_and_a_missing_shard(workplace: Workplace, url: str, s3: S3Server) -> None:
    for overrides, said in (
        (["data.root=s3://no-such-bucket/digits"], "s3://no-such-bucket/digits/dataset.json: missing"),
        (["data.root=digits", "replay.store=s3://no-such-bucket/pools"], "s3://no-such-bucket/pools"),
    ):
        _, output = finish(workplace.train(*overrides, "run.name=bucket"), code=2)
        assert [line for line in output.splitlines() if line.startswith("error") and said in line], output
        assert not (workplace.path / "runs" / "bucket" / "metrics.jsonl").exists()  # before the first step
    store = ObjectStore(url, Patience(20.0, 10.0))
    name = "train/task-02/train-02-00001.tar"
    shard = store.read(name)
    store.delete(name)
    try:
        _, output = finish(workplace.train(f"data.root={url}", "run.name=shard"), code=2)
        assert f"error: {url}/{name}: missing; key data.root" in output, output
    finally:
        store.write(name, shard)


def test_shards_and_pool_from_the_store_give_the_same_weights(
    workplace: Workplace, url: str, expected: str, s3: S3Server
) -> None:
    finish(workplace.train(f"data.root={url}", POOL, "run.name=remote"), 600)
    assert workplace.teacher_id("remote") == expected
    run = workplace.path / "runs" / "remote"
    assert not list((run / "tasks" / "2" / "replay").glob("*.tar"))
    pools = ObjectStore(f"s3://{BUCKET}/pools/remote", Patience(20.0, 10.0))
    left = pools.sizes(f"task-02-{_teacher(run)}")
    assert left and not [name for name in left if name.endswith(".tar")], "lines stay, shards go"
    told = (run / "config.yaml").read_text() + "".join(path.read_text() for path in run.rglob("*.jsonl"))
    assert workplace.environment["AWS_SECRET_ACCESS_KEY"] not in told


def _teacher(run: Path) -> str:
    card = json.loads((run / "tasks" / "1" / "teacher" / "card.json").read_text())
    return card["teacher_id"][:12]


def test_the_server_dies_and_returns_while_a_run_learns(
    workplace: Workplace, url: str, expected: str, server: S3Server
) -> None:
    """Killed once the second task has begun, with its shards neither fetched nor made; back after some seconds."""
    process = workplace.train(f"data.root={url}", POOL, "run.name=outage")
    run = workplace.path / "runs" / "outage"
    wait_for(run / "tasks" / "2" / "replay" / "request.json")
    server.kill()
    time.sleep(8)
    server.start()
    _, output = finish(process, 600)
    assert workplace.teacher_id("outage") == expected
    said = [line for line in output.splitlines() if "trying again for up to" in line]
    assert said and "answers again" in output, output
    result = json.loads((run / "metrics.json").read_text())
    assert result["replay"]["events"]["store_away"] >= 1
    away = [event["seconds"] for event in read_events(RunDir(run)) if event["event"] == "store_away"]
    assert max(away) > 5  # whether data or pool was waited for, which is a matter of chance here


def test_a_server_that_stays_away_ends_the_run_which_then_goes_on(
    workplace: Workplace, url: str, expected: str, server: S3Server
) -> None:
    limits = ["data.store_timeout=4", "data.request_timeout=2"]
    process = workplace.train(f"data.root={url}", POOL, "run.name=gone", *limits)
    run = workplace.path / "runs" / "gone"
    wait_for(run / "tasks" / "2" / "replay" / "request.json")
    server.kill()
    try:
        _, output = finish(process, 240, code=2)
        errors = [line for line in output.splitlines() if line.startswith("error")]
        assert len(errors) == 1 and f"s3://{BUCKET}/" in errors[0] and "store" in errors[0], output
    finally:
        server.start()
    finish(workplace.train(f"data.root={url}", POOL, "run.name=gone"), 600)
    assert workplace.teacher_id("gone") == expected
