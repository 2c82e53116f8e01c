"""The learning-rate schedule: a pure function of the step and of a few keys of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from training.config.schema import TrainingConfig

HORIZON_KEYS = ("max_steps", "schedule_steps", "wsd_decay_steps")
"""Keys of the section "training" that say where the schedule ends, and where the decay of wsd begins."""


class Schedule(NamedTuple):
    """The keys of the section "training" that decide the learning rate, under their names."""

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    lr_scheduler: str
    wsd_decay_steps: int | None
    max_steps: int
    schedule_steps: int | None

    @classmethod
    def of(cls, cfg: TrainingConfig) -> Schedule:
        return cls(*(getattr(cfg, name) for name in cls._fields))

    @classmethod
    def from_plain(cls, training: Mapping[str, Any]) -> Schedule:
        """That of a plain configuration, also an earlier version's or one that is refused today."""
        return cls(*(training.get(name, getattr(TrainingConfig, name)) for name in cls._fields))

    def factor(self, step: int) -> float:
        """The multiplier of the base learning rate for the update after `step` finished ones.

        During warm-up it rises linearly, from 1 / warmup_steps (with 0 the first update would change nothing) to 1.
        Then training.lr_scheduler decides: "cosine" and "linear" fall from the end of warm-up to schedule_steps
        (default: max_steps); "wsd" stays at 1 and falls linearly over the last wsd_decay_steps (default: a fifth of the
        schedule, at least 1, or what the warm-up leaves). They reach min_learning_rate after the last step, so the
        last update is still above it, except for a decay of one step. Warm-up may be longer than the run.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        end = self.schedule_steps or self.max_steps
        start, wsd = self.warmup_steps, self.lr_scheduler == "wsd"
        if wsd:
            decay = max(1, end // 5) if self.wsd_decay_steps is None else self.wsd_decay_steps
            start = max(start, end - decay)
        if wsd and end - start == 1:
            progress = float(step >= start)
        else:
            progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.lr_scheduler == "cosine" else 1 - progress
        floor = self.min_learning_rate / self.learning_rate
        return floor + (1 - floor) * shape

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` finished ones."""
        return self.learning_rate * self.factor(step)

    def with_horizon_of(self, other: Schedule) -> Schedule:
        """This schedule, ending where `other` ends."""
        return self._replace(**{name: getattr(other, name) for name in HORIZON_KEYS})
