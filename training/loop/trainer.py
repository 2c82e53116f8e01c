"""The training loop: one story from top to bottom."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from gsa import GSAForCausalLM
from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.legacy import read_legacy
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import RunState
from training import config as run_config
from training.checkpointing.resume import Start
from training.checkpointing.saver import Retention, Saver, SaveReport
from training.config import BatchPlan, RunConfig
from training.data import Loader, PackedTokens, past
from training.engine.build import build_engine
from training.engine.engine import DEEPSPEED_VERSION
from training.engine.world import World
from training.engine.zero_internals import health_metrics, probe_metrics
from training.loop.completions import continuations
from training.loop.evaluate import evaluate, unigram_score
from training.loop.step import StepSums, forward_backward, summed
from training.loop.step_clock import StepClock
from training.loop.stopping import StopRequest
from training.loop.watchdog import Watchdog
from training.observe.banner import closing_summary, start_banner
from training.observe.console import Console, LogLevel
from training.observe.telemetry import SETTLED, Telemetry
from training.observe.tracking.run_identity import tracked_as
from training.planning.space import checkpoint_bytes
from training.record.metrics_log import MetricsLog, iter_rows, rewind
from training.record.replay_receipt import ReplayReceipt, describe
from training.record.run_folder import PROJECT, RunFolder, version
from training.record.spike_score import WINDOW, SpikeDetector
from training.tracking import Tracker

GC_INTERVAL = 50
"""Steps between collections of Python's garbage, alike on all ranks: one that pauses by itself keeps others waiting."""

MAX_ROLLBACKS = 10
"""Of a run. One that needs more does not suffer from a few bad samples: its spikes are logged from there on."""

MAX_LOST_IN_A_ROW = 10
"""Steps without a finite loss one after another, of which the last ends a run with on_spike=skip: then it is the
weights that are broken."""


T = TypeVar("T")


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def _finite(row: dict) -> bool:
    """Of a step, fresh or read back, where what is not finite is a word."""
    return all(math.isfinite(float(row.get(name, 0.0))) for name in ("loss", "indexer_loss", "grad_norm"))


def _latest(folder: RunFolder) -> str | None:
    """What `latest` names; None when it cannot be read, which the next publication mends."""
    try:
        return manifest.latest_tag(folder.path)
    except CheckpointError:
        return None


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and its seconds."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


class Trainer:
    """Owns a run from its first step to its last checkpoint.

    start: the verified checkpoint to continue and where its state leads, or None. The folder has been claimed,
    the configuration checked.
    """

    def __init__(
        self,
        cfg: RunConfig,
        *,
        ds_config: dict,
        plan: BatchPlan,
        world: World,
        folder: RunFolder,
        data: PackedTokens,
        held_out: PackedTokens,
        start: Start | None,
        watchdog: Watchdog,
        log_level: LogLevel = "info",
    ) -> None:
        self.cfg, self.plan, self.world, self.folder = cfg, plan, world, folder
        self.data, self.held_out, self.watchdog = data, held_out, watchdog
        self.step = self.samples = self.tokens = self.indexer_start = 0
        self.epoch_offset = 0.0
        self.decided: dict = {}
        self.skipped: list[tuple[int, int]] = []  # (first, count) of samples that a rollback has ruled out
        self._stop = StopRequest()
        self._unigram_bpb: float | None = None

        self.telemetry = Telemetry(cfg, plan, ds_config, world)
        self.engine, self.backend, fault = build_engine(
            cfg, ds_config, world, init_from=cfg.training.init_from if start is None else None
        )
        self.model: GSAForCausalLM = self.engine.module

        self.console = Console(world.is_main, self._end(), log_interval=cfg.training.log_interval, level=log_level)
        if fault is not None:
            self.console.warn(f"attention runs on the chunked kernels, not on Triton's: {fault}")
        self._continued = (
            start is not None
            and not start.legacy
            and start.state.step > 0
            and (start.checkpoint.parent.resolve() == folder.path.resolve())
        )
        tracked = tracked_as(cfg, folder, start, self._continued) if world.is_main else None
        self.tracking_id, self._parent = world.broadcast(tracked)
        if start is not None:
            self._take_up(start)
        self._first_step = self.step
        self._ds_config = ds_config
        self._receipt = ReplayReceipt([])
        self.world.barrier()  # every rank has read run.json before rank 0 writes it
        self.log: MetricsLog | None = None
        self.tracker: Tracker | None = None
        if world.is_main:
            if self._continued and _latest(folder) != start.checkpoint.name:
                # a kill came before it was published, or what `latest` names is about to be set aside
                manifest.publish(folder.path, start.checkpoint.name)
            segment = self._open_run(start, moved=self._set_aside())
            self.tracker = Tracker(
                cfg.logging,
                output_dir=folder.path,
                run_id=self.tracking_id,
                config=run_config.to_plain(cfg),
                step=self.step,
                segment=segment,
                parent=self._parent,
                quiet=log_level == "warning",
            )
            self._introduce()
        self._take_up_rows()
        self.saver = Saver(
            self.engine,
            world,
            folder.path,
            background=cfg.training.async_save,
            bytes_needed=checkpoint_bytes(cfg, start and start.checkpoint),
            retention=Retention(cfg.training.keep_last, cfg.training.keep_every),
            published=self._published,
            beat=lambda: self.watchdog.beat("save"),
        )

    # -- before the first step -------------------------------------------------------------------------

    def _end(self) -> int:
        stop = self.cfg.training.stop_at_step
        return self.cfg.training.max_steps if stop is None else min(stop, self.cfg.training.max_steps)

    def _take_up(self, start: Start) -> None:
        self.watchdog.beat("load")
        if start.legacy:
            # every rank reads the file: where one cannot, all must hear of it
            self.engine.load_full_state(
                self.engine.raise_on_all_ranks(lambda: read_legacy(start.checkpoint, self.cfg.model, start.state))
            )
        else:
            self.engine.load(start.checkpoint)
        # what the yaml says runs: DeepSpeed brings back the saved rates, decay, betas and clipping
        self.engine.apply_hyperparameters(self.cfg.training)
        self._position(start.state)
        to_do = f"continuing at step {self.step + 1} of {self._end()}" if self.step < self._end() else "at its end"
        self.console.line(f"resumed {start.checkpoint.name}: {to_do}, epoch {self._epoch():.3f}")

    def _position(self, state: RunState) -> None:
        """Where in the run and in its data the state stands becomes ours."""
        self.step, self.samples, self.tokens = state.step, state.samples_consumed, state.tokens_seen
        self.indexer_start, self.epoch_offset, self.decided = state.indexer_start, state.epoch_offset, state.decided
        self.skipped = [(first, count) for first, count in state.skipped]

    def _epoch(self) -> float:
        return self.epoch_offset + self.data.epoch(self.samples)

    def _set_aside(self) -> list[dict]:
        """Checkpoints and rows of steps after this one, left by a dead branch, go to segments/; returns the rows."""
        # also for a fresh start: a run that died before its first checkpoint has left rows behind
        for line in self.folder.set_aside(self.step):
            self.console.line(line)
        return rewind(self.folder.metrics, self.step)

    def _take_up_rows(self) -> None:
        """What goes on from the rows of metrics.jsonl, which rank 0 reads."""
        losses, lost, evaluated = deque(maxlen=WINDOW), 0, -1
        for row in iter_rows(self.folder.metrics) if self.world.is_main else ():
            if "loss" in row:
                lost = 0 if _finite(row) else lost + 1
                if math.isfinite(float(row["loss"])):
                    losses.append(float(row["loss"]))
            elif row.get("event") == "eval":
                evaluated = row["step"]
        losses, self._lost_in_a_row, self._evaluated_at = self.world.broadcast((list(losses), lost, evaluated))
        self._spikes = SpikeDetector(losses)

    def _open_run(self, start: Start | None, moved: list[dict]) -> int:
        """Begins the log of this launch; returns how many there were before it."""
        run = self.folder.read_run()
        segment = run.get("segments", 0)
        self.log = MetricsLog(self.folder.metrics)
        self._receipt = ReplayReceipt(moved)
        parent = None if self._parent is None else asdict(self._parent)
        self.folder.update_run(
            status="running",
            reason=None,
            step=self.step,
            tracking_id=self.tracking_id,
            world_size=self.world.size,
            zero_stage=self.engine.zero_stage,
            backend=self.backend,
            segments=segment + 1,
            parent=parent,
        )
        config = run_config.to_plain(self.cfg)
        event = {
            "event": "start" if start is None else "resume",
            "step": self.step,
            "world_size": self.world.size,
            "zero_stage": self.engine.zero_stage,
            "segment": segment,
            "config": config,
        }
        if start is not None:
            changes = run_config.config_changes(start.state.config, config)
            event |= {
                "checkpoint": start.checkpoint.name,
                "rows_moved": len(moved),
                "config_diff": {c.key: [c.old, c.new] for c in changes},
            }
        self._event(event)
        self._event({**self.telemetry.describe(), "step": self.step})
        return segment

    def _introduce(self) -> None:
        shown_by = self.tracker.shown_by
        tracking = " and ".join(f"{name} run {self.tracking_id}" if name == "W&B" else name for name in shown_by)
        self.console.table(
            f"GSA trainer {version(PROJECT)}",
            start_banner(
                self.cfg,
                self.plan,
                self._ds_config,
                self.data,
                self.folder.path,
                self.telemetry.describe(),
                backend=self.backend,
                tracking=tracking or "not tracked elsewhere",
            ),
        )

    def _event(self, row: dict) -> None:
        assert "loss" not in row
        self._record({**row, "time": time.time()})

    def _record(self, row: dict) -> None:
        """A row of a step or an event, on rank 0: into metrics.jsonl, then to whoever mirrors it."""
        if self.log is not None:
            self.log.write(row)
        if self.tracker is not None:
            self.tracker.tell(row)

    def close(self, exit_code: int = 0) -> None:
        """Ends tracking and frees the engine; the process group stays."""
        self.console.close()
        self.telemetry.close()
        if self.tracker is not None:
            self.tracker.finish(exit_code)
        if self.log is not None:
            self.log.close()
        self.engine.destroy()

    # -- the loop --------------------------------------------------------------------------------------

    def train(self) -> str:
        """Trains to the stop or the end. Returns the reason it ended: "finished", "stop_at_step" or a signal's name.

        Raises Diverged when the loss or the gradient norm is not finite, and on_spike does not go on from there; the
        last checkpoint stays good.
        """
        try:
            return self._train()
        except Exception as err:
            with suppress(CheckpointError):  # a disk that is full takes no last words either
                self._event({"event": "error", "step": self.step, "reason": str(err) or type(err).__name__})
            raise

    def _train(self) -> str:
        cfg = self.cfg.training
        self._stop.listen()
        loader = self._loader()
        began, recent, evaluated = time.perf_counter(), deque(maxlen=100), None
        clock = StepClock(self.world.device)
        saved_at = self.step if self._continued else -1  # another folder's checkpoint is not ours yet
        stop_signal = 0
        pace: float | None = None  # seconds per step, a running mean for the ETA
        stood = {"seconds_save": 0.0, "seconds_eval": 0.0}  # since the step before
        self.engine.train()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            if self._continued and self._evaluation_due() and self._evaluated_at != self.step:
                evaluated = self._evaluate()  # a kill came between the save and it
            while self.step < self._end() and not stop_signal:
                row, stop_signal = self._one_step(loader, clock)
                row |= stood | {"time": time.time()}
                stood = dict.fromkeys(stood, 0.0)
                if self._rolled_back(row):
                    loader.close()
                    loader, saved_at = self._loader(), self.step
                    continue
                self._tell(row)
                recent.append(row)
                pace = row["seconds"] if pace is None else 0.9 * pace + 0.1 * row["seconds"]
                self.console.step(row, pace * (self._end() - self.step))
                if stop_signal:  # whoever sent it may not wait for an evaluation
                    self._save()
                    self._finish_save()
                    saved_at = self.step
                if self._evaluation_due():
                    evaluated, stood["seconds_eval"] = _timed(self._evaluate)
                if cfg.sample_interval and self.step % cfg.sample_interval == 0:
                    stood["seconds_eval"] += _timed(self._sample)[1]
                # while losses are lost the weights may be broken: none of the good ones is to make room for them
                due = cfg.save_interval and self.step % cfg.save_interval == 0 and not self._lost_in_a_row
                if (due or self.step == self._end()) and saved_at != self.step:
                    stood["seconds_save"] = _timed(self._save)[1]
                    saved_at = self.step
                if self.step % GC_INTERVAL == 0:
                    gc.collect()
        except Diverged:
            try:
                self._finish_save()  # all ranks are here: what was good before is kept
            except CheckpointError as err:
                self.console.warn(f"the last save failed too: {err}")
            raise
        finally:
            gc.enable()
            gc.unfreeze()
            loader.close()
        if saved_at != self.step:  # nothing to train: a copy in this run's layout
            self._save()
        self._finish_save()
        if stop_signal:
            reason = signal.Signals(stop_signal).name
        else:
            reason = "finished" if self.step >= cfg.max_steps else "stop_at_step"
        if (receipt := self._receipt.event()) is not None:
            self._event({**receipt, "step": self.step})
        self._event({"event": "stop", "step": self.step, "reason": reason})
        if self.world.is_main:
            status = "finished" if reason == "finished" else "stopped"
            self.folder.update_run(status=status, reason=reason, step=self.step)
            self.console.table(
                "done",
                closing_summary(
                    reason=reason,
                    first_step=self._first_step,
                    rows=list(recent),
                    seconds=time.perf_counter() - began,
                    evaluated=evaluated,
                    checkpoint=_latest(self.folder),
                ),
            )
        return reason

    def _evaluation_due(self) -> bool:
        interval = self.cfg.training.eval_interval
        return bool(interval and self.step % interval == 0) or self.step == self._end()

    def _loader(self) -> Loader:
        return Loader(
            self.data,
            samples_consumed=self.samples,
            plan=self.plan,
            rank=self.world.rank,
            skipped=self.skipped,
            num_workers=self.cfg.data.num_workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _tell(self, row: dict) -> None:
        """A step is done: its row goes to the log, to W&B, and is held against the step it may replay."""
        spike = row["spike_score"] > self.cfg.training.spike_sigmas or not _finite(row)
        if self.log is not None:
            self._record(row)
            if spike:
                self._event(self._spike(row, "skip" if self.cfg.training.on_spike == "skip" else "log"))
            if self.step == self._first_step + SETTLED:
                self._event({**self.telemetry.predicted(row["seconds"], self.backend), "step": self.step})
            if (receipt := self._receipt.compare(row)) is not None:
                self._event({**receipt, "step": self.step})
                self.console.line(describe(receipt))
        if spike:
            self.console.warn(
                f"step {self.step}: loss {row['loss']:.4f} is a spike, {row['spike_score']:.1f} sigmas"
                if _finite(row)
                else f"step {self.step}: loss {row['loss']:.4f}, indexer loss {row['indexer_loss']:.4f}: update dropped"
            )
        for message in self.telemetry.messages():
            self.console.warn(message)

    def _one_step(self, loader: Loader, clock: StepClock) -> tuple[dict, int]:
        """One optimizer step. Returns its row, all but what the loop knows, and an agreed signal or 0."""
        began = time.perf_counter()
        cfg, plan = self.cfg.training, self.plan
        first = past(self.skipped, self.samples, plan.global_batch_size)
        self.model.set_stage("dense" if self.step - self.indexer_start < cfg.indexer_warmup_steps else "sparse")
        rates = self.engine.learning_rates()
        probing, examining = self._due(cfg.probe_interval), self._due(cfg.health_interval)
        n_targets = self.data.n_targets(first, plan.global_batch_size)
        done = forward_backward(
            self.engine,
            loader,
            cfg,
            plan,
            step=self.step,
            n_targets=n_targets,
            probing=probing,
            examining=examining,
            phase=lambda name: self._phase(clock, name),
            drop=self._spiking if cfg.on_spike == "skip" else None,
        )
        self.step += 1
        self.samples = first + plan.global_batch_size
        self.tokens += plan.global_batch_size * cfg.max_seq_len

        # One small collective and one wait for the device per step, whatever the accumulation. The flags are filled
        # on the device: a tensor made of Python numbers would be copied there, and wait for it.
        like = done.selection
        flags = [like.new_full((), float(flag)) for flag in (self._stop.number, *self.saver.flags())]
        shared = {
            "means": done.means() / self.world.size,
            "flags": torch.stack(flags),
            "selection": done.selection,
            "ranks": self.telemetry.shares(like),
            "probes": done.probes.nan_to_num(0),
            "probed": ~done.probes.isnan(),
        }
        if done.updates is not None:
            shared["updates"] = done.updates.squares().to(like)
        if done.squares is not None:
            shared["squares"] = done.squares
        shared = summed(shared)
        if not done.dropped:
            self.model.update_v_ref(shared["selection"])
        loss, indexer_loss, n_selected, n_seen = shared["means"].tolist()
        signal_sum, settled, failed = shared["flags"].tolist()
        self.saver.advance(settled, failed)
        grad_norm = self.engine.grad_norm()
        row = {
            "step": self.step,
            "epoch": self._epoch(),
            "samples": self.samples,
            "tokens": self.tokens,
            "loss": loss,
            "spike_score": self._spikes.score(loss),
            "indexer_loss": indexer_loss,
            "grad_norm": grad_norm,
            "lr": rates["decay"],
            "lr_indexer": rates.get("indexer", 0.0),
            "stage": self.model.stage,
            "selected_k": n_selected,
            "visible_k": n_seen,
        }
        self._lost_in_a_row = 0 if _finite(row) else self._lost_in_a_row + 1
        dropped = done.dropped and self._lost_in_a_row < MAX_LOST_IN_A_ROW
        if not _finite(row) and not dropped and not self._may_roll_back():
            if self.log is not None:  # which step, and of which samples: training.replay asks
                self.log.write(row | {"time": time.time()})
            self._diverged(done, first, loss, grad_norm)
        if probing:
            row |= probe_metrics(shared["probes"], shared["probed"])
        if examining:
            row |= health_metrics(shared.get("squares"), shared["updates"])
        phases = clock.read()
        del phases["other"]  # what the host adds to it belongs there too: see Telemetry.of_step
        row |= {f"seconds_{name}": spent for name, spent in phases.items()}
        row |= self.telemetry.of_step(time.perf_counter() - began, phases, shared["ranks"], n_selected, n_seen)
        return row, self._agree_on_signal() if signal_sum else 0

    def _due(self, interval: int) -> bool:
        """Whether the step that begins is one of every `interval`."""
        return bool(interval) and (self.step + 1) % interval == 0

    # -- spikes ----------------------------------------------------------------------------------------

    def _spiking(self, done: StepSums) -> bool:
        """Before the update: whether the step's loss is a spike, or no number. Waits for the device."""
        loss, indexer_loss, *_ = summed({"means": done.means() / self.world.size})["means"].tolist()
        lost = not math.isfinite(loss) or not math.isfinite(indexer_loss)
        return lost or self._spikes.score(loss) > self.cfg.training.spike_sigmas

    def _spike(self, row: dict, action: str) -> dict:
        samples = [self.samples - self.plan.global_batch_size, self.samples - 1]
        return {
            "event": "spike",
            "step": row["step"],
            "spike_loss": row["loss"],
            "score": row["spike_score"],
            "samples": samples,
            "action": action,
        }

    def _may_roll_back(self) -> bool:
        return self.cfg.training.on_spike == "rollback" and len(self.skipped) < MAX_ROLLBACKS

    def _rolled_back(self, row: dict) -> bool:
        """Judges the step's loss; after a spike goes back to the last good checkpoint, past the step's samples, if it
        is to and can."""
        broken = not _finite(row)
        spike = broken or row["spike_score"] > self.cfg.training.spike_sigmas
        if not spike or not self._may_roll_back():
            if math.isfinite(row["loss"]):
                self._spikes.add(row["loss"])
            return False
        self._finish_save()
        found, passed_over = self.world.broadcast(
            manifest.newest_good(self.folder.path) if self.world.is_main else (None, [])
        )
        for line in passed_over:
            self.console.warn(str(line))
        if found is None:
            if broken:
                if self.log is not None:
                    self.log.write(row)
                raise Diverged(
                    f"step {self.step}: loss {row['loss']}, gradient norm {row['grad_norm']}, and no checkpoint yet to "
                    f"roll back to; lower training.learning_rate or training.save_interval"
                )
            self.console.line(f"step {self.step}: a spike, and no checkpoint yet to roll back to: going on")
            self._spikes.add(row["loss"])
            return False
        event = self._spike(row, "rollback") | {"checkpoint": found.name}
        bad = (self.samples - self.plan.global_batch_size, self.plan.global_batch_size)
        self.engine.load(found)
        self.engine.apply_hyperparameters(self.cfg.training)
        known = self.skipped
        self._position(read_run_state(found))
        self.skipped = sorted({*self.skipped, *known, bad})
        if self.log is not None:
            if _latest(self.folder) != found.name:  # what it names is about to be set aside
                manifest.publish(self.folder.path, found.name)
            self.log.write(row)  # it goes to the segment with the steps before it
            self.log.close()
            self._set_aside()
            self.log = MetricsLog(self.folder.metrics)
            self._event(event)
        self.console.rewound(self.step)
        what = (
            f"loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.3g}: not finite"
            if broken
            else (f"loss {row['loss']:.4f} is a spike ({row['spike_score']:.1f} sigmas)")
        )
        self.console.line(f"step {row['step']}: {what}; back to {found.name}, past samples {bad[0]}..{sum(bad) - 1}")
        self._take_up_rows()
        return True

    def _phase(self, clock: StepClock, name: str) -> None:
        # the first step of a process compiles, allocates and opens connections
        self.watchdog.beat(name if self._warm else "first step")
        clock.lap(name)

    @property
    def _warm(self) -> bool:
        return self.step > self._first_step

    def _diverged(self, done: StepSums, first: int, loss: float, grad_norm: float) -> None:
        """Every rank is here, since the sums are the same on all: find out whose micro-batches did it, and raise."""
        plan = self.plan
        bad = [
            m
            for m, pair in enumerate(zip(done.losses, done.indexer_losses, strict=True))
            if not all(math.isfinite(float(x)) for x in pair)
        ]
        found = []
        for rank, micros in enumerate(self.world.gather(bad)):
            for micro in micros:
                start = first + (micro * plan.world_size + rank) * plan.micro_batch_size
                samples = np.arange(start, start + plan.micro_batch_size)
                where = "; ".join(str(place) for place in self.data.describe(samples))
                found.append(f"rank {rank}, samples {start}..{start + plan.micro_batch_size - 1} ({where})")
        culprits = "\n  ".join(found) or (
            f"no single micro-batch: the gradient of samples {first}..{first + plan.global_batch_size - 1} "
            f"is not finite"
        )
        newest = manifest.latest_tag(self.folder.path)
        raise Diverged(
            f"step {self.step}: loss {loss}, gradient norm {grad_norm}. Found in:\n  {culprits}\n"
            f"Nothing was saved after it; the last good checkpoint is {newest or 'none yet'}. "
            f"Lower training.learning_rate or look at these samples, then --resume_from latest."
        )

    # -- signals ---------------------------------------------------------------------------------------

    def _agree_on_signal(self) -> int:
        """The highest signal any rank has seen; called on all ranks when at least one has seen one."""
        seen = torch.tensor([self._stop.number], device=self.world.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return int(seen)

    # -- evaluation and checkpoints --------------------------------------------------------------------

    def _evaluate(self) -> dict:
        """Scores the sparse model, which is what will be used; in the dense stage that one too. Returns the event."""
        began = time.perf_counter()
        cfg, stage = self.cfg.training, self.model.stage
        row: dict = {"event": "eval", "step": self.step}
        for scored, suffix in [("sparse", "")] + ([("dense", "_dense")] if stage == "dense" else []):
            self.model.set_stage(scored)
            score = evaluate(
                self.engine,
                self.held_out,
                self.world,
                n_windows=cfg.eval_windows,
                micro_batch_size=self.plan.micro_batch_size,
                beat=self._beat,
            )
            row |= {f"eval_loss{suffix}": score.loss, f"eval_bpb{suffix}": score.bpb, "eval_tokens": score.tokens}
        self.model.set_stage(stage)
        if self._unigram_bpb is None:  # on all ranks: none waits for another, and their signs of life stay even
            self._unigram_bpb = unigram_score(self.held_out, n_windows=cfg.eval_windows, beat=self._beat).bpb
        if not self.world.is_main:
            return row
        row |= {"unigram_bpb": self._unigram_bpb, "eval_seconds": time.perf_counter() - began}
        self._event(row)
        dense = f", dense {row['eval_bpb_dense']:.4f}" if "eval_bpb_dense" in row else ""
        self.console.line(
            f"step {self.step}: held-out {row['eval_bpb']:.4f} bits per byte{dense} (unigram "
            f"{self._unigram_bpb:.4f}), loss {row['eval_loss']:.4f}, {row['eval_seconds']:.1f} s"
        )
        return row

    def _beat(self) -> None:
        self.watchdog.beat("evaluate")

    def _sample(self) -> None:
        """Continues the fixed prompts, on all ranks together: under ZeRO 3 every forward pass is a collective."""
        cfg, stage = self.cfg.training, self.model.stage
        self.model.set_stage("sparse")
        for prompt, text in continuations(self.engine, self.data, cfg.sample_prompts, cfg.sample_tokens, self._beat):
            self._event({"event": "sample", "step": self.step, "prompt": prompt, "text": text})
            self.console.line(f"step {self.step}: {prompt!r} -> {text!r}")
        self.model.set_stage(stage)

    def _save(self) -> None:
        self.watchdog.beat("save")
        self.saver.start(
            RunState(
                step=self.step,
                epoch=self._epoch(),
                samples_consumed=self.samples,
                tokens_seen=self.tokens,
                config=run_config.to_plain(self.cfg),
                data_fingerprint=self.data.fingerprint,
                tracking_id=self.tracking_id,
                stage=self.model.stage,
                versions={"torch": str(torch.__version__), "deepspeed": DEEPSPEED_VERSION, "project": version(PROJECT)},
                world_size=self.world.size,
                zero_stage=self.engine.zero_stage,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                epoch_offset=self.epoch_offset,
                indexer_start=self.indexer_start,
                decided=self.decided,
                skipped=[list(pair) for pair in self.skipped],
            )
        )

    def _finish_save(self) -> None:
        """Nobody exits before the checkpoint exists."""
        self.watchdog.beat("save")
        self.saver.finish()

    def _published(self, report: SaveReport) -> None:
        self._event(
            {
                "event": "save",
                "step": report.step,
                "tag": report.tag,
                "bytes": report.bytes,
                "save_stall_seconds": report.stall_s,
                "save_background_seconds": report.background_s,
                "save_background_cpu_seconds": report.background_cpu_s,
            }
        )
        self.console.line(
            f"saved {report.tag}: {report.bytes / 2**20:.1f} MiB, training stood still for {report.stall_s:.2f} s, "
            f"written in {report.stall_s + report.background_s:.2f} s"
        )
        for removed in report.removed:
            self.console.line(str(removed))
