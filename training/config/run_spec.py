"""A run as it was resolved before any process group existed: three things that always travel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.config.batch import BatchPlan
from training.config.schema import RunConfig


@dataclass(frozen=True)
class RunSpec:
    """What a run was started with: its configuration, how its batch is divided over ranks, and the one DeepSpeed dict.

    ds_config is complete, with nothing left "auto"; all three agree on batch, clipping and precision.
    """

    cfg: RunConfig
    plan: BatchPlan
    ds_config: dict[str, Any]

    @property
    def last_step(self) -> int:
        """The step after which this launch ends: training.stop_at_step, or the end of the schedule."""
        training = self.cfg.training
        return training.max_steps if training.stop_at_step is None else min(training.stop_at_step, training.max_steps)
