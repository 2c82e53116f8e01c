"""Everything that a run reports while it lives, through one object: rank 0 records, the other ranks stay silent.

A row goes one way: into metrics.jsonl first, which is the truth of the run, then to the trackers, then to the console.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gsa.checkpoint.state import RunState
from training.config import RunSpec, config_changes, to_plain
from training.observe.banner import closing_summary, start_banner
from training.observe.console import Console, LogLevel
from training.observe.telemetry import SETTLED, Telemetry
from training.observe.tracking.run_identity import identify_run
from training.observe.tracking.tracker import Tracker
from training.record import numerics
from training.record.metrics_log import MetricsLog, rewind, rows_from_end
from training.record.replay_receipt import ReplayReceipt, describe
from training.record.run_folder import PROJECT, RunFolder, version
from training.record.spike_score import WINDOW

RECENT_STEPS = 100
"""Steps whose medians the closing summary shows."""


@dataclass(frozen=True)
class History:
    """What goes on from the rows that metrics.jsonl holds.

    losses: the last finite ones. lost_in_a_row: how many of the last steps were not finite. evaluated_at, sampled_at:
    the step of the last evaluation and of the last completions, or -1 when they came before these losses.
    """

    losses: list[float] = field(default_factory=list)
    lost_in_a_row: int = 0
    evaluated_at: int = -1
    sampled_at: int = -1


class SilentRecorder:
    """What the other ranks have in place of a Recorder: the same methods, none of which does anything."""

    def line(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def begin(
        self,
        *,
        checkpoint: Path | None,
        state: RunState | None,
        continued: bool,
        zero_stage: int,
        backend: str,
        data: str,
        data_fingerprint: str,
    ) -> str | None:
        return None

    def history(self) -> History:
        return History()

    def step(self, row: dict, spike: dict | None, message: str | None) -> None:
        pass

    def last_row(self, row: dict) -> None:
        pass

    def event(self, row: dict) -> None:
        pass

    def roll_back(self, row: dict, event: dict, step: int, checkpoint: str) -> None:
        pass

    def save_failed(self, step: int, reason: str) -> None:
        pass

    def failed(self, step: int, reason: str) -> None:
        pass

    def finish(self, step: int, reason: str) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        pass


class Recorder(SilentRecorder):
    """Rank 0's: metrics.jsonl, trackers, console, resume receipt and run.json.

    Nothing is written before `begin`; lines and warnings are printed from the start.
    """

    def __init__(self, spec: RunSpec, folder: RunFolder, telemetry: Telemetry, *, log_level: LogLevel) -> None:
        self._spec, self._folder, self._telemetry = spec, folder, telemetry
        self._quiet = log_level == "warning"
        self._console = Console(spec.last_step, log_interval=spec.cfg.training.log_interval, level=log_level)
        self._log: MetricsLog | None = None
        self._tracker: Tracker | None = None
        self._receipt = ReplayReceipt([])
        self._backend = ""
        self._began, self._first_step = time.perf_counter(), 0
        self._pace: float | None = None
        """seconds per step, a running mean for the estimate of the time left"""
        self._recent: deque[dict] = deque(maxlen=RECENT_STEPS)
        self._evaluated: dict | None = None

    # -- lines on the console --------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """A line on the console."""
        self._console.line(text)

    def warn(self, text: str) -> None:
        """A warning, printed at every log level."""
        self._console.warn(text)

    # -- the launch ------------------------------------------------------------------------------------

    def begin(
        self,
        *,
        checkpoint: Path | None,
        state: RunState | None,
        continued: bool,
        zero_stage: int,
        backend: str,
        data: str,
        data_fingerprint: str,
    ) -> str:
        """Opens metrics.jsonl at the step of the launch, writes its first rows, starts the trackers, prints the banner.

        checkpoint, state: what the launch resumes from, or None. continued: that checkpoint lies in this run's folder.
        data: a line about the training text. Rows and checkpoints of later steps, which a launch that died or a
        discarded branch left behind, are moved to segments/ first. Returns the id that the run is tracked by.
        """
        cfg, step = self._spec.cfg, 0 if state is None else state.step
        identity = identify_run(cfg, self._folder, state, continued=continued)
        for text in self._folder.discard_after(step, resumed_from=checkpoint.name if continued else None):
            self.line(text)
        moved = rewind(self._folder.metrics, step)
        device = self._telemetry.describe()
        now = numerics.of_this_launch(self._spec, zero_stage=zero_stage, backend=backend, device=device["name"])
        run = self._folder.read_run()
        segment = run.get("segments", 0)
        self._log = MetricsLog(self._folder.metrics, self.warn)
        self._receipt = self._compare_with(moved, run, state, now)
        self._backend, self._first_step = backend, step
        world_size = self._spec.plan.world_size
        self._folder.update_run(
            status="running",
            reason=None,
            step=step,
            tracking_id=identity.id,
            world_size=world_size,
            zero_stage=zero_stage,
            backend=backend,
            numerics=now,
            segments=segment + 1,
            parent=None if identity.parent is None else asdict(identity.parent),
        )
        config = to_plain(cfg)
        first = {
            "event": "start" if state is None else "resume",
            "step": step,
            "world_size": world_size,
            "zero_stage": zero_stage,
            "segment": segment,
            "data_fingerprint": data_fingerprint,
            "numerics": now,
            "config": config,
        }
        if state is not None:
            changes = config_changes(state.config, config)
            first |= {
                "checkpoint": checkpoint.name,
                "rows_moved": len(moved),
                "config_diff": {change.key: [change.old, change.new] for change in changes},
            }
        self.event(first)
        self.event({**device, "step": step})
        self._tracker = Tracker(
            cfg.logging,
            output_dir=self._folder.path,
            run_id=identity.id,
            config=config,
            step=step,
            segment=segment,
            parent=identity.parent,
            quiet=self._quiet,
        )
        shown_by = [f"W&B run {identity.id}" if name == "W&B" else name for name in self._tracker.shown_by]
        tracking = " and ".join(shown_by) or "not tracked elsewhere"
        self._console.table(
            f"GSA trainer {version(PROJECT)}",
            start_banner(self._spec, data, self._folder.path, device, backend=backend, tracking=tracking),
        )
        self._began = time.perf_counter()
        return identity.id

    def _compare_with(self, moved: list[dict], run: dict, state: RunState | None, now: dict) -> ReplayReceipt:
        """The receipt of the discarded rows `moved`. Prints what has changed, if not as a key, since the last launch.

        run: run.json, as that launch left it. now: of this launch, from training/record/numerics.py.
        """
        last = numerics.of_run(run)
        silent = {k: v for k, v in numerics.differences([last], now).items() if k in ("kernels", "device", "torch")}
        if silent:
            self.line(f"changed since the last launch: {numerics.in_words(silent)} (rounds differently)")
        began = next((row for row in _tail(self._folder.metrics) if row["event"] in ("start", "resume")), None)
        if began is None and state is not None:  # the launch that trained the step resumed from also saved it
            first, config = numerics.of_checkpoint(state), state.config
        else:
            first, config = numerics.of_row(began or {}), (began or {}).get("config")
        launches = [numerics.of_row(row) for row in moved if row.get("event") in ("start", "resume")]
        changed = numerics.differences([first, *(launches or [last])], now)
        if isinstance(config, dict) and moved:
            step = 0 if state is None else state.step
            steps = range(step, max((row["step"] for row in moved if "loss" in row), default=step))
            found = config_changes(config, to_plain(self._spec.cfg), steps=steps)
            changed |= {c.key: [c.old, c.new] for c in found if c.effect == "curve"}
        return ReplayReceipt(moved, changed)

    def history(self) -> History:
        """Reads what goes on from the last rows of metrics.jsonl, as many as there are losses that count."""
        losses: deque[float] = deque()
        lost, went_on, evaluated_at, sampled_at = 0, False, -1, -1
        for row in rows_from_end(self._folder.metrics):
            if "loss" in row:
                numbers = [float(row.get(name, 0.0)) for name in ("loss", "indexer_loss", "grad_norm")]
                went_on = went_on or all(map(math.isfinite, numbers))
                lost += not went_on
                if math.isfinite(numbers[0]):
                    losses.appendleft(numbers[0])
                if went_on and len(losses) >= WINDOW:
                    break
            elif row.get("event") == "eval" and evaluated_at < 0:
                evaluated_at = row["step"]
            elif row.get("event") == "sample" and sampled_at < 0:
                sampled_at = row["step"]
        return History(list(losses)[-WINDOW:], lost, evaluated_at, sampled_at)

    # -- rows ------------------------------------------------------------------------------------------

    def step(self, row: dict, spike: dict | None, message: str | None) -> None:
        """A finished step. spike: the event of a step whose loss was one; message: the warning that goes with it."""
        self._write(row)
        if spike is not None:
            self.event(spike)
        if row["step"] == self._first_step + SETTLED:
            self.event({**self._telemetry.predicted(row["seconds"], self._backend), "step": row["step"]})
        if (receipt := self._receipt.compare(row)) is not None:
            self.event({**receipt, "step": row["step"]})
            self.line(describe(receipt))
        if message is not None:
            self.warn(message)
        for text in self._telemetry.messages():
            self.warn(text)
        self._recent.append(row)
        self._pace = row["seconds"] if self._pace is None else 0.9 * self._pace + 0.1 * row["seconds"]
        self._console.step(row, self._pace * (self._spec.last_step - row["step"]))

    def last_row(self, row: dict) -> None:
        """The row of a step that the run does not continue from: `replay` shows it, trackers do not."""
        self._log.write(row if "time" in row else {**row, "time": time.time()})

    def event(self, row: dict) -> None:
        """An event of the run; its time is added."""
        assert "loss" not in row
        if row["event"] == "eval":
            self._evaluated = row
        self._write({**row, "time": time.time()})

    def _write(self, row: dict) -> None:
        self._log.write(row)
        if self._tracker is not None:
            self._tracker.offer(row)

    def roll_back(self, row: dict, event: dict, step: int, checkpoint: str) -> None:
        """The run has gone back to `checkpoint` of `step`. row: the step that it does not keep; event: why."""
        self.last_row(row)  # it goes to `segments/` with the steps before it
        self._log.close()
        for text in self._folder.discard_after(step, resumed_from=checkpoint):
            self.line(text)
        rewind(self._folder.metrics, step)
        self._log = MetricsLog(self._folder.metrics, self.warn)
        self.event(event)
        self._console.rewound(step)

    def save_failed(self, step: int, reason: str) -> None:
        """A save that the run goes on without."""
        self.event({"event": "save_failed", "step": step, "reason": reason})
        self.warn(f"{reason}\ntraining goes on; the next save will try again")

    # -- the end ---------------------------------------------------------------------------------------

    def failed(self, step: int, reason: str) -> None:
        """The run ends out of order."""
        self.event({"event": "error", "step": step, "reason": reason})

    def finish(self, step: int, reason: str) -> None:
        """The run ends in order. reason: finished, stop_at_step, or the name of a signal."""
        if (receipt := self._receipt.event()) is not None:
            self.event({**receipt, "step": step})
        self.event({"event": "stop", "step": step, "reason": reason})
        status = "finished" if reason == "finished" else "stopped"
        self._folder.update_run(status=status, reason=reason, step=step, ends=None)
        entries = closing_summary(
            reason=reason,
            first_step=self._first_step,
            rows=list(self._recent),
            seconds=time.perf_counter() - self._began,
            evaluated=self._evaluated,
            checkpoint=self._folder.latest(),
        )
        self._console.table("done", entries)

    def close(self, exit_code: int = 0) -> None:
        """Ends the trackers and closes the files."""
        self._console.close()
        if self._tracker is not None:
            self._tracker.finish(exit_code)
        if self._log is not None:
            self._log.close()


def _tail(path: Path) -> Iterator[dict]:
    """The events after the last step of metrics.jsonl, the newest first."""
    return itertools.takewhile(lambda row: "loss" not in row and "event" in row, rows_from_end(path))


def open_recorder(
    is_main: bool, spec: RunSpec, folder: RunFolder, telemetry: Telemetry, *, log_level: LogLevel
) -> SilentRecorder:
    """The recorder of this rank."""
    return Recorder(spec, folder, telemetry, log_level=log_level) if is_main else SilentRecorder()
