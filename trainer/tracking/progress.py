"""The progress bar of the training loop; on a pipe or in a file a plain line every few seconds instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Not among the loss terms: no measures of learning, or shown in places of their own.
SPECIAL_KEYS = ("task", "seen", "step", "lr", "images_per_second")
PLACED_KEYS = (
    *("pool_fill", "pool_ready", "starved_seconds", "teacher_evaluations"),
    *("data_wait_seconds", "replay_wait_seconds", "peak_memory_gb", "model_tflops", "mfu"),
)
SHOWN_WAIT = 0.05  # seconds since the last log: less is not worth the room
SMOOTHING = 0.7  # of the rate: share of the old value
REFRESH_PER_SECOND = 4


@dataclass
class _State:
    """What is on the screen."""

    task: int = 1
    seen: int = 0
    rate: float | None = None  # images per second
    metrics: dict[str, float] = field(default_factory=dict)
    activity: str = ""


class TrainingProgress:
    """Task k of T, images seen, images/s, loss terms, pool fill, starved seconds, time left.

    On a terminal two lines at its foot, drawn by a thread; elsewhere a line every `plain_every` seconds.
    `images` are those that each task sees. Times left count training alone, not evaluation.
    """

    def __init__(
        self,
        images: Sequence[int],
        *,
        console: Console | None = None,
        plain_every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images_of, self._tasks = list(images), len(images)
        self._console = console or Console()
        self._plain_every, self._clock = plain_every, clock
        self._state = _State()
        self._last_update: tuple[float, int] | None = None
        self._last_plain = float("-inf")
        self._live: Live | None = None

    def start_task(self, task: int, seen: int = 0) -> None:
        """Begin task `task` (from 1), of which `seen` images were already learnt before a restart."""
        self._state = _State(task=task, seen=seen, rate=self._state.rate)
        self._last_update = (self._clock(), seen)
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
                redirect_stdout=True,
                redirect_stderr=True,
            )
            self._live.start()

    def update(self, seen: int, metrics: Mapping[str, float]) -> None:
        """Show the state after `seen` images of the task; `metrics` are Python numbers, of any names.

        "pool_fill" (0 to 1) and "starved_seconds" have places of their own, every other number is shown as a loss term.
        """
        now = self._clock()
        if self._last_update and now > self._last_update[0] and seen > self._last_update[1]:
            rate = (seen - self._last_update[1]) / (now - self._last_update[0])
            old = self._state.rate
            self._state.rate = rate if old is None else SMOOTHING * old + (1 - SMOOTHING) * rate
        self._last_update = (now, seen)
        self._state.seen, self._state.activity = seen, ""
        self._state.metrics = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if self._live is None and (now - self._last_plain >= self._plain_every or seen >= self._images):
            self._last_plain = now
            self._print(f"{self._head()}  {self._body()}  {self._rate()}")

    def activity(self, text: str) -> None:
        """Say what is going on besides training ("sampling 2,000 images"); the next update takes its place."""
        self._state.activity, self._last_update = text, None
        if self._live is None:
            self._print(f"task {self._state.task}/{self._tasks}  {text}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def stop(self) -> None:
        """Take the bar away; the terminal is as it was. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def _images(self) -> int:
        return self._images_of[self._state.task - 1]

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _head(self) -> str:
        share = 100 * self._state.seen / self._images if self._images else 100.0
        return f"task {self._state.task}/{self._tasks}  {self._state.seen:,}/{self._images:,} images ({share:.0f} %)"

    def _rate(self) -> str:
        rate = self._state.rate
        if not rate:
            return "-- images/s"
        left = sum(self._images_of[self._state.task - 1 :]) - self._state.seen
        return f"{rate:,.0f} images/s  {duration(left / rate)} left"

    def _body(self) -> str:
        metrics = self._state.metrics
        parts = [f"{key} {value:.4g}" for key, value in metrics.items() if key not in (*SPECIAL_KEYS, *PLACED_KEYS)]
        if "pool_fill" in metrics:
            parts.append(f"pool {100 * metrics['pool_fill']:.0f} %")
        if "starved_seconds" in metrics:
            parts.append(f"starved {metrics['starved_seconds']:.1f} s")
        if metrics.get("data_wait_seconds", 0.0) >= SHOWN_WAIT:
            parts.append(f"data wait {metrics['data_wait_seconds']:.1f} s")
        if "peak_memory_gb" in metrics:
            parts.append(f"{metrics['peak_memory_gb']:.1f} GB")
        if "mfu" in metrics:
            parts.append(f"MFU {100 * metrics['mfu']:.0f} %")
        return "  ".join(parts)

    def _render(self) -> Group:
        bar = ProgressBar(total=max(self._images, 1), completed=self._state.seen, width=None)
        first = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            first.add_column(ratio=ratio, no_wrap=True)
        label = Text(f"task {self._state.task}/{self._tasks}", style="bold")
        numbers = Text(f"{self._state.seen:,}/{self._images:,}  ", style="green").append(self._rate(), style="cyan")
        first.add_row(label, bar, numbers)
        second = self._state.activity or self._body()
        return Group(first, Text(second, style="dim", no_wrap=True, overflow="ellipsis"))


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
