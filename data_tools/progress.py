"""How far a build is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

INTERVAL = 60.0  # seconds between two lines


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} images/s")


@contextmanager
def progress(shown: bool, what: str, total: int, done: int = 0) -> Generator[Callable[[int], None], None, None]:
    """A function to tell of so many more images; any thread may call it."""
    console = Console(stderr=True)
    if not shown or console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not shown) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
    else:
        yield _lines(what, total, done)


def _lines(what: str, total: int, done: int) -> Callable[[int], None]:
    lock = threading.Lock()
    began = told = time.monotonic()
    now = done

    def advance(count: int) -> None:
        nonlocal now, told
        with lock:
            now += count
            if time.monotonic() - told < INTERVAL:
                return
            told = time.monotonic()
            rate = (now - done) / (told - began)
            left = f", {(total - now) / rate / 60:.0f} min to go" if rate else ""
            print(f"{what}: {now:,} of {total:,} images, {rate:,.0f} images/s{left}", file=sys.stderr, flush=True)

    return advance
