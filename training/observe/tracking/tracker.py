"""Forwards the rows of a run to Weights & Biases and TensorBoard."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.config import LoggingConfig
from training.observe.tracking.mirror import Limits, Mirror, Sink
from training.observe.tracking.tensorboard_sink import TensorboardSink
from training.observe.tracking.tracking_state import LaunchInfo, Parent
from training.observe.tracking.wandb_sink import open_wandb
from training.record.metrics_log import rows_after


class Tracker:
    """Forwards rows of metrics.jsonl to W&B (logging.wandb) and TensorBoard files (logging.tensorboard), on rank 0.

    Without a key or a connection W&B writes offline, with one line on stderr. A sink that fails is switched off with
    one line on stderr, and the training goes on: nothing here raises, and `offer` never waits.

    run_id: the run's tracking id, the same for all launches. config: plain, the whole configuration of this launch.
    step: the step resumed from, 0 for a new run; metrics.jsonl ends there. segment: launches of this run before this
    one. parent: of a fork. quiet: do not print the address of the W&B run.

    shown_by: names of the services that rows are sent to.
    """

    def __init__(
        self,
        cfg: LoggingConfig,
        *,
        output_dir: Path,
        run_id: str,
        config: dict[str, Any],
        step: int = 0,
        segment: int = 0,
        parent: Parent | None = None,
        quiet: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self._mirrors: list[Mirror] = []
        launch = LaunchInfo(run_id, config, step, segment, parent)
        makers: dict[str, Callable[[], Sink | None]] = {}
        if cfg.wandb:
            makers["W&B"] = lambda: open_wandb(cfg, output_dir, launch, quiet=quiet)
        if cfg.tensorboard:
            makers["TensorBoard"] = lambda: TensorboardSink(output_dir / "tensorboard", step)
        for name, make in makers.items():
            try:
                # not on the mirror's thread, where importing the package would slow the first steps down
                sink = make()
            except Exception as err:  # a package that is missing or broken, or a wrong environment variable
                why = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
                print(f"{name}: {why}; training goes on without it", file=sys.stderr, flush=True)
                continue
            if sink is None:
                continue
            history = functools.partial(_rows_between, output_dir / "metrics.jsonl", step)
            self._mirrors.append(Mirror(sink, history, limits or Limits()))
        self.shown_by = [mirror.name for mirror in self._mirrors]

    def offer(self, row: dict) -> None:
        """Queues a row as metrics.jsonl has it; the numbers of an event are shown with the last step before it."""
        for mirror in self._mirrors:
            mirror.offer(dict(row))

    def finish(self, exit_code: int) -> None:
        """Sends what is queued and ends tracking; waits at most Limits.finish_s for each service."""
        for mirror in self._mirrors:
            mirror.finish(exit_code)


def _rows_between(path: Path, resumed_from: int, last: int) -> Iterator[dict]:
    """Rows of metrics.jsonl of the steps after `last` up to `resumed_from`, with their events."""
    began = False
    for row in rows_after(path, last) if last < resumed_from else ():
        if "event" not in row:
            if row["step"] > resumed_from:
                return
            began = began or row["step"] > last
        if began:
            yield row
