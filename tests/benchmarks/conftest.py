"""The fork server of the contenders: one for all tests here, and none left for those of other directories."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def own_fork_server() -> Iterator[None]:
    """A process has one fork server, which imports what the first one to start it asked for."""
    server: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    server._stop()
    yield
    server._stop()
