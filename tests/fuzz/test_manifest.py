"""The journal of a replay pool, damaged: every shard that a view of it reports was published just so."""

from __future__ import annotations

import json

from tests.fuzz.conftest import Workplace, random_batch
from tests.fuzz.mutate import amount, byte_mutants, settled, tree_mutants
from trainer.replay.manifest import Manifest, ShardLine
from trainer.replay.pool import encode, publish
from trainer.replay.transport import FilePool


def fill(workplace: Workplace) -> list[ShardLine]:
    """Six shards, one of them taken back and published again, one retired; all lines ever published."""
    manifest, lines = Manifest(workplace.run.replay(2)), []
    for shard in (0, 1, 2, 3, 4, 5, 1):
        content = encode(workplace.request, shard, [random_batch(workplace.request, shard)])
        given = {"evaluations": 42, "seconds": 0.5, "worker": 0, "micro_batch": 4}
        lines.append(publish(FilePool(workplace.run.replay(2)), manifest, workplace.request, shard, content, **given))
        if len(lines) == 6:
            manifest.redo(1, lines[1].id, "corrupt")
    manifest.retire(4, lines[4].id)
    return lines


@amount(1500)
def test_bytes_of_a_manifest(workplace: Workplace, count: int) -> None:
    lines = fill(workplace)
    path, seen = Manifest(workplace.run.replay(2)).path, 0
    original = path.read_bytes()
    view = Manifest(path.parent)
    for data in byte_mutants(original, count, seed=0):
        path.write_bytes(data)
        for manifest in (Manifest(path.parent), view):  # one that sees it first, one that saw the file before
            settled(manifest.refresh, str(path))
            seen += len(manifest.shards)
            assert all(line in lines and line.shard == shard for shard, line in manifest.shards.items())
    assert seen > count


@amount(1000)
def test_structure_of_a_manifest(workplace: Workplace, count: int) -> None:
    lines = fill(workplace)
    path = Manifest(workplace.run.replay(2)).path
    trees = [json.loads(line) for line in path.read_text().splitlines()]
    for tree in tree_mutants(trees, count, seed=0):
        rows = tree if isinstance(tree, list) else [tree]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        manifest = Manifest(path.parent)
        settled(manifest.refresh, str(path))
        assert all(line in lines and line.shard == shard for shard, line in manifest.shards.items())
