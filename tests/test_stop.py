"""Being asked to stop: by a signal, by another process of the job, in the middle of work that may be broken off."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.stop import STOP_SIGNALS, Stopped, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of before."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_breaks_nothing_off(number: int) -> None:
    stop = StopRequest()
    assert not stop.wanted()
    os.kill(os.getpid(), number)
    assert stop.wanted()


def test_a_person_who_asks_twice_does_not_wait() -> None:
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.wanted()


def test_work_that_leaves_nothing_to_save_is_broken_off() -> None:
    stop = StopRequest()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped, match="the same command goes on"), stop.interrupting():
        threading.Event().wait(30)
    with pytest.raises(Stopped), stop.interrupting():  # and does not begin
        pytest.fail("begun")


def test_outside_of_it_a_signal_only_asks() -> None:
    stop = StopRequest()
    with stop.interrupting():
        pass
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.wanted()


def test_another_process_may_wish_it(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "stop")
    assert not stop.wanted()
    (tmp_path / "stop").touch()
    assert stop.wanted()
