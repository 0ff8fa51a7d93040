"""One rank of a pool: reads requests from standard input, one JSON line each, and answers with one."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trainer.engine
import trainer.partition
from tests.distributed import cases
from trainer.world import World, join_world


def answer(world: World, request: dict[str, Any]) -> dict[str, Any]:
    try:
        with sizes_restored():
            return {"result": getattr(cases, request["case"])(world, **request["arguments"])}
    except Exception:  # noqa: BLE001  whatever a case raises is the test's to report
        return {"traceback": traceback.format_exc()}


@contextmanager
def sizes_restored() -> Iterator[None]:
    """Toys make pieces of a few elements; a whole run after them would take minutes to gather so."""
    known = [
        (trainer.engine, "PERSISTENT_NUMEL"),
        (trainer.engine, "check_engine"),
        (trainer.partition, "GATHER_NUMEL"),
    ]
    before = [(module, name, getattr(module, name)) for module, name in known]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    world = join_world(0, 1)
    print(json.dumps({"result": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(world, json.loads(line))), file=replies, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
