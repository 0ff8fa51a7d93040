"""The progress bar on a pipe and on a terminal, with a clock of our own."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.tracking.progress import TrainingProgress, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, clock: Clock, updates: int = 10) -> TrainingProgress:
    progress = TrainingProgress([1000] * 3, console=console, plain_every=10.0, clock=clock)
    progress.start_task(2)
    for step in range(1, updates + 1):
        clock.now += 5.0
        progress.update(100 * step, {"loss": 0.125, "pool_fill": 0.5, "starved_seconds": 2.0, "lr": 1e-4})
    return progress


def rendered(progress: TrainingProgress) -> list[str]:
    """What the bar shows, without the codes that place it."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as shown:
        console.print(progress._render())
    return shown.get().splitlines()


def test_plain_lines_every_few_seconds_without_control_codes() -> None:
    out = io.StringIO()
    run(Console(file=out, force_terminal=False, width=80), Clock()).stop()
    lines = out.getvalue().splitlines()
    seen = ["100/1,000", "300/1,000", "500/1,000", "700/1,000", "900/1,000", "1,000/1,000"]
    assert [line.split()[2] for line in lines] == seen
    # 20 images/s; 900 of this task and 1,000 of the next are left
    assert lines[0] == (
        "task 2/3  100/1,000 images (10 %)  loss 0.125  pool 50 %  starved 2.0 s  20 images/s  1:35 left"
    )
    assert "\x1b" not in out.getvalue() and "lr" not in out.getvalue()


def test_memory_share_and_waits_have_places_of_their_own() -> None:
    out, clock = io.StringIO(), Clock()
    progress = TrainingProgress([1000], console=Console(file=out, force_terminal=False), plain_every=0.0, clock=clock)
    progress.start_task(1)
    clock.now += 1
    measures = {"model_tflops": 402.0, "replay_wait_seconds": 0.0, "peak_memory_gb": 31.25, "mfu": 0.407}
    progress.update(100, {"loss": 0.5, "data_wait_seconds": 0.31, **measures})
    clock.now += 1
    progress.update(200, {"loss": 0.5, "data_wait_seconds": 0.01, **measures})
    first, second = out.getvalue().splitlines()
    assert "loss 0.5  data wait 0.3 s  31.2 GB  MFU 41 %  100 images/s" in first
    assert "loss 0.5  31.2 GB  MFU 41 %  100 images/s" in second


def test_rate_counts_training_alone_and_survives_a_resume() -> None:
    out, clock = io.StringIO(), Clock()
    progress = TrainingProgress([1000], console=Console(file=out, force_terminal=False), plain_every=0.0, clock=clock)
    progress.start_task(1, seen=500)
    clock.now += 10
    progress.update(600, {})
    progress.activity("sampling 2,000 images")
    clock.now += 1000
    progress.update(700, {})
    clock.now += 10
    progress.update(800, {})
    lines = out.getvalue().splitlines()
    assert lines[1] == "task 1/1  sampling 2,000 images"
    assert [line.split("  ")[-2] for line in (lines[0], lines[2], lines[3])] == ["10 images/s"] * 3


def test_terminal_shows_two_lines_and_leaves_none() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    progress = run(console, Clock(), updates=4)
    first, second = rendered(progress)
    assert first.startswith("task 2/3") and "400/1,000" in first and "20 images/s" in first and len(first) == 80
    assert second.strip() == "loss 0.125  pool 50 %  starved 2.0 s"
    progress.activity("evaluating")
    assert rendered(progress)[1].strip() == "evaluating"
    progress.note("task 1 learnt")
    progress.stop()
    progress.stop()
    assert "task 1 learnt\n" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K") or out.getvalue().endswith("\x1b[?25h")  # erased, cursor shown again


def test_no_images_no_division_by_zero() -> None:
    out = io.StringIO()
    progress = TrainingProgress([0], console=Console(file=out, force_terminal=False))
    progress.start_task(1)
    progress.update(0, {})
    assert "0/0 images (100 %)" in out.getvalue() and "-- images/s" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (-1, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
