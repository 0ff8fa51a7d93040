"""Where the time of a step goes: its sections by marks in the stream, its kernels by torch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONGEST = 12  # kernels named
Moment = tuple[str, float, torch.cuda.Event | None]


class Marks:
    """Sections of a step, each from its mark to the next; nothing is done while they are off."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Moment] | None = None

    def __call__(self, section: str) -> None:
        """A section begins."""
        if self._moments is None:
            return
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._moments.append((section, time.perf_counter(), event))

    def on(self) -> None:
        self._moments = []

    def off(self) -> dict[str, dict[str, float]]:
        """Milliseconds of each section in a mean step: `host`, issuing it, and on CUDA `device`, in the stream.

        The last section of the last step has no end and is left out; so steps are counted by the first section.
        """
        moments, self._moments = self._moments or [], None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (section, began, first), (_, ended, last) in pairwise(moments):
            sums[section]["host"] += (ended - began) * 1e3
            if first is not None and last is not None:
                sums[section]["device"] += first.elapsed_time(last)
        steps = max(1, sum(section == moments[0][0] for section, _, _ in moments) if moments else 1)
        return {name: {kind: total / steps for kind, total in kinds.items()} for name, kinds in sums.items()}


class Profile:
    """torch's profiler over some steps: on CUDA the kernels, on a CPU the operators."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._cuda else [])
        self._profile = profile(activities=activities)

    def __enter__(self) -> Profile:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def totals(self, steps: int) -> dict[str, Any]:
        """Of a mean step: milliseconds in which kernels (on a CPU operators) ran, their number, the longest of them."""
        kind = "CUDA" if self._cuda else "CPU"
        events = [
            event
            for event in self._profile.key_averages()
            if event.device_type.name == kind and not getattr(event, "is_user_annotation", False)
        ]
        times = {event.key: self._milliseconds(event) / steps for event in events}
        longest = sorted(times, key=lambda key: -times[key])[:LONGEST]
        return {
            "busy_ms": sum(times.values()),
            "kernels": sum(event.count for event in events) / steps,
            "longest_ms": {name[:120]: times[name] for name in longest},
        }

    def _milliseconds(self, event: Any) -> float:
        return (event.self_device_time_total if self._cuda else event.self_cpu_time_total) / 1e3
