"""The profiler switch (`tracking.profile_steps`): a few steps of an attempt, recorded on every trainer rank."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.config import Config
from trainer.data.shards import write_atomic
from trainer.errors import say
from trainer.run import RunDir
from trainer.tracking.tracker import Tracker
from trainer.world import World

WARMUP = 3  # steps before, recorded and thrown away: the first ones under a profiler are slow
ROWS = 25  # of the table


class StepProfiler:
    """Records `profile_steps` steps from step `profile_start` of this attempt on, with torch.profiler.

    Fewer where the task ends first; where it ends in the warm-up, the next task's. A recorded step computes what any
    other does. What the loop gives a name with `record_function` shows as a span.
    """

    def __init__(self, config: Config, run: RunDir, world: World, tracker: Tracker) -> None:
        """Collective where there is something to record."""
        self._tracker = tracker
        self._start, self._count = config.tracking.profile_start, config.tracking.profile_steps
        self._warmup = min(WARMUP, self._start)
        self._done = self._first = 0  # steps of this attempt, and the first one recorded
        self._over = self._count == 0
        self._profile: Any = None
        if self._count:
            attempt = world.broadcast_int(run.newest_attempt())  # its directory: the others may not see it yet
            self._paths = run.profile(attempt, world.rank), run.profile_table(attempt, world.rank)
            self._sort_by = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"

    def begin_step(self) -> None:
        """To be called before each step."""
        if self._over or self._profile is not None or self._done < self._start - self._warmup:
            return
        self._first = self._done + self._warmup
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self._warmup, active=self._count, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def end_step(self) -> None:
        """To be called after each step."""
        self._done += 1
        if self._profile is not None:
            self._profile.step()
            if self._done == self._first + self._count:
                self.stop()

    def stop(self) -> None:
        """A task ends: what was recorded of it is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def close(self) -> None:
        """The attempt ends."""
        self.stop()
        if not self._over:
            self._tracker.note(
                f"tracking.profile_start={self._start}: this attempt took {self._done} steps, none was recorded"
            )

    def _write(self, recorded: Any) -> None:
        if self._done <= self._first:
            return
        self._over = True
        trace, table = self._paths
        hidden = trace.with_name(f".{trace.name}")  # ends alike, which says that it is to be compressed
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(hidden))
            hidden.replace(trace)
            text = recorded.key_averages().table(sort_by=self._sort_by, row_limit=ROWS)
            write_atomic(table, text.encode())
        except OSError as error:  # a full disk must not end the training
            say(f"warning: {trace}: {error.strerror or error}: the profile is lost")
            return
        steps = f"{self._first} to {self._done - 1}"
        self._tracker.note(f"profiled steps {steps} of this attempt (from 0): {trace}, {table.name}")
