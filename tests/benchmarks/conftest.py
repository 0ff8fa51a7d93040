"""The contenders are forked from the server that also the end-to-end tests use: a process has one."""

from __future__ import annotations

import pytest

from tests.end_to_end.zygote import start_server


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Started first by whoever comes first; it imports what all of them need."""
    start_server()
