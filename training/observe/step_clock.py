"""Seconds of a step by phase, measured without making the device wait."""

from __future__ import annotations

import time

import torch


class StepClock:
    """`lap(name)` starts a phase and ends the one before; `read()` ends the step.

    On a GPU the marks are events in the stream: a phase is the time that the device spent on it, and time in which the
    device was idle while the host fetched data counts as data. On the CPU the marks are wall times.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def lap(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds per phase since the first lap, repeats summed. Waits for the device once."""
        end = self._now()
        if self._cuda:
            end.synchronize()
        seconds: dict[str, float] = {}
        following = [mark for _, mark in self._marks[1:]] + [end]
        for (name, mark), after in zip(self._marks, following, strict=True):
            spent = mark.elapsed_time(after) / 1000 if self._cuda else after - mark
            seconds[name] = seconds.get(name, 0.0) + spent
        self._marks.clear()
        return seconds
