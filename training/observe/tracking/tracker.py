"""Hands the rows of a run to Weights & Biases and TensorBoard."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.config import LoggingConfig
from training.observe.tracking.mirror import Limits, Mirror, Sink
from training.observe.tracking.tensorboard_sink import TensorboardSink
from training.observe.tracking.tracking_state import Parent
from training.observe.tracking.wandb_sink import open_wandb
from training.record.metrics_log import iter_rows


class Tracker:
    """Hands rows of metrics.jsonl to W&B (logging.wandb) and TensorBoard files (logging.tensorboard), on rank 0.

    Without a key or a connection W&B writes offline, and says so. Whatever fails is switched off with one line on
    stderr, and the training goes on; nothing here raises, and `tell` never waits.

    run_id: the id that the run keeps. config: plain, the whole configuration of this segment. step: the step resumed
    from, 0 for a new run; metrics.jsonl ends there. segment: launches of this run before this one. parent: of a fork.
    quiet: the run's address is not printed. shown_by: who is told, by name.
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
        makers: dict[str, Callable[[], Sink | None]] = {}
        if cfg.wandb:
            makers["W&B"] = lambda: open_wandb(cfg, output_dir, run_id, config, step, segment, parent, quiet)
        if cfg.tensorboard:
            makers["TensorBoard"] = lambda: TensorboardSink(output_dir / "tensorboard", step)
        for name, make in makers.items():
            try:
                # here and not on the mirror's thread, where importing would compete with the first steps
                sink = make()
            except Exception as err:  # a package that is missing or broken, an environment that says nonsense
                why = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
                print(f"{name}: {why}; training goes on without it", file=sys.stderr, flush=True)
                continue
            if sink is None:
                continue
            history = functools.partial(_rows_between, output_dir / "metrics.jsonl", step)
            self._mirrors.append(Mirror(sink, history, limits or Limits()))
        self.shown_by = [mirror.name for mirror in self._mirrors]

    def offer(self, row: dict) -> None:
        """Takes a row as metrics.jsonl has it; an event's numbers are shown with those of the last step before it."""
        for mirror in self._mirrors:
            mirror.offer(dict(row))

    def finish(self, exit_code: int) -> None:
        """Ends tracking: when all is handed on, or after Limits.finish_s seconds for each mirror."""
        for mirror in self._mirrors:
            mirror.finish(exit_code)


def _rows_between(path: Path, step: int, last: int) -> Iterator[dict]:
    """Rows of metrics.jsonl after step `last` up to step `step`, which was resumed from."""
    began = False
    for row in iter_rows(path) if last < step else ():
        if "event" not in row:
            if row["step"] > step:
                return
            began = began or row["step"] > last
        if began:
            yield row
