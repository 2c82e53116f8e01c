"""The training loop: one story from top to bottom."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from gsa import GSAForCausalLM
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.state import RunState
from training.checkpointing.resume import Start, position_in_text, restore
from training.checkpointing.saver import Retention, Saver
from training.config import RunSpec, to_plain
from training.data import Loader, PackedTokens, raise_fault
from training.engine.build import build_engine
from training.engine.world import World
from training.loop.evaluate import EvaluationError, Evaluator, Interrupted, is_due
from training.loop.progress import Progress
from training.loop.spike_policy import (
    Action,
    Diverged,
    SpikePolicy,
    checkpoint_to_restore,
    describe,
    diverged,
    spike_event,
)
from training.loop.step import StepSums, forward_backward, reduce_step, sum_over_ranks
from training.loop.stopping import StopRequest
from training.loop.watchdog import Watchdog
from training.observe.recorder import LogLevel, open_recorder
from training.observe.telemetry import Telemetry
from training.record.run_folder import RunFolder, versions

GC_INTERVAL = 50
"""Run Python's garbage collector every N steps on all ranks together; a rank that pauses alone stalls the others."""


@dataclass(frozen=True)
class Step:
    """A finished optimizer step. samples: [first, count]. stop_signal: the one that all ranks agreed on, or 0."""

    row: dict
    action: Action
    samples: list[int]
    stop_signal: int


class Trainer:
    """Owns a run from its first step to its last checkpoint.

    start: the verified checkpoint to continue and the state to go on from, or None. bytes_needed: the expected size of
    a checkpoint, on rank 0. The folder has been claimed and the configuration checked.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        world: World,
        folder: RunFolder,
        data: PackedTokens,
        held_out: PackedTokens,
        start: Start | None,
        watchdog: Watchdog,
        bytes_needed: int = 0,
        log_level: LogLevel = "info",
    ) -> None:
        self.spec, self.cfg, self.plan = spec, spec.cfg.training, spec.plan
        self.world, self.folder, self.data, self.watchdog = world, folder, data, watchdog
        self.stop = StopRequest()
        self.telemetry = Telemetry(spec, world)  # before the model, whose memory it measures
        init_from = self.cfg.init_from if start is None else None
        self.engine, self.backend, fault = build_engine(spec.cfg, spec.ds_config, world, init_from=init_from)
        self.model: GSAForCausalLM = self.engine.module
        self.recorder = open_recorder(world.is_main, spec, folder, self.telemetry, log_level=log_level)
        if fault is not None:
            self.recorder.warn(f"attention runs on the chunked kernels, not on Triton's: {fault}")
        self.progress = Progress()
        if start is not None:
            self._load(start)
        self._first_step = self.progress.step
        self._continued = start is not None and start.continues(folder)
        self.tracking_id: str = world.from_main(
            lambda: self.recorder.begin(
                checkpoint=start and start.checkpoint,
                state=start and start.state,
                continued=self._continued,
                zero_stage=self.engine.zero_stage,
                backend=self.backend,
                data=data.summary(
                    planned=self.progress.planned_samples(self.cfg.max_steps, self.plan.global_batch_size)
                ),
                data_fingerprint=data.fingerprint,
            )
        )
        self.evaluator = Evaluator(
            self.engine,
            spec,
            data,
            held_out,
            world,
            interrupted=lambda: bool(self.stop.agree(world.device)),
            beat=lambda: self.watchdog.beat("evaluate"),
        )
        self._read_history()
        self.saver = Saver(
            self.engine,
            world,
            folder.path,
            background=self.cfg.async_save,
            bytes_needed=bytes_needed,
            retention=Retention(self.cfg.keep_last, self.cfg.keep_every),
            saved_at=self.progress.step if self._continued else -1,  # another folder's checkpoint is not ours yet
            published=lambda report: self._report(report.event(), *report.lines()),
            failed=self.recorder.save_failed,
            tokenizer=data.tokenizer,
            beat=lambda: self.watchdog.beat("save"),
        )

    def _load(self, start: Start) -> None:
        self.watchdog.beat("load")
        restore(self.engine, start, self.spec.cfg.model)
        self._apply_state(start.state)
        step, end = self.progress.step, self.spec.last_step
        to_do = f"continuing at step {step + 1} of {end}" if step < end else "at its end"
        self.recorder.line(f"resumed {start.checkpoint.name}: {to_do}, epoch {self._epoch():.3f}")

    def _apply_state(self, state: RunState) -> None:
        # what the yaml says applies: DeepSpeed brings back the saved rates, decay, betas and clipping
        self.engine.apply_hyperparameters(self.cfg)
        self.progress = Progress.from_state(state)

    def _read_history(self) -> None:
        history = self.world.from_main(self.recorder.history)
        self.spikes = SpikePolicy(self.cfg, history.losses, history.lost_in_a_row)
        self.evaluator.evaluated_at, self.evaluator.sampled_at = history.evaluated_at, history.sampled_at

    # -- the loop --------------------------------------------------------------------------------------

    def train(self) -> str:
        """Trains until the end, `stop_at_step` or a stop request.

        Returns "finished", "stop_at_step" or the name of the signal. Raises Diverged when the loss or the gradient norm
        is not finite and training.on_spike does not continue from there; the last checkpoint stays good.
        """
        stop_signal = 0
        self.stop.listen()
        self.engine.train()
        self._open_loader()
        with collecting_garbage_together(), self._ending_in_order():
            if self._continued:
                stop_signal = self._judge()  # a kill may have come between the save and it
            while self.progress.step < self.spec.last_step and not stop_signal:
                step = self._train_step()  # forward, backward, one all-reduce, update
                stop_signal = step.stop_signal
                if step.action == "rollback" and self._roll_back(step):
                    continue
                self._record(step)
                if self._save_due():
                    self._save()
                if not stop_signal:  # whoever sent it may not wait for an evaluation
                    stop_signal = self._judge()
                if is_due(GC_INTERVAL, self.progress.step):
                    gc.collect()
        self._save_last()
        return self._finish(stop_signal)

    def _finish(self, stop_signal: int) -> str:
        if stop_signal:
            reason = signal.Signals(stop_signal).name
        else:
            reason = "finished" if self.progress.step >= self.cfg.max_steps else "stop_at_step"
        self.recorder.finish(self.progress.step, reason)
        return reason

    def close(self, exit_code: int = 0) -> None:
        """Ends the trackers and frees the engine; the process group stays."""
        self.telemetry.close()
        self.recorder.close(exit_code)
        self.engine.destroy()

    @contextmanager
    def _ending_in_order(self) -> Iterator[None]:
        """Closes the loader; when the run has diverged, it first waits for the save in flight, which is a good one."""
        try:
            yield
        except Diverged:
            self._finish_save()  # all ranks are here
            raise
        finally:
            self.loader.close()

    def _open_loader(self) -> None:
        self.loader = Loader(
            self.data,
            samples_consumed=self.progress.samples_consumed,
            plan=self.plan,
            rank=self.world.rank,
            skipped=self.progress.skipped,
            num_workers=self.spec.cfg.data.num_workers,
            pin_memory=self.world.device.type == "cuda",
            defer_faults=True,
        )

    def _epoch(self) -> float:
        return self.progress.epoch_offset + self.data.epoch(self.progress.samples_consumed)

    # -- one step --------------------------------------------------------------------------------------

    def _train_step(self) -> Step:
        """Runs one optimizer step and decides what to do with it. Raises Diverged when the run cannot go on from it."""
        began = time.perf_counter()
        cfg, plan, progress = self.cfg, self.plan, self.progress
        first = progress.next_sample(plan.global_batch_size)
        warming_up = progress.step - progress.indexer_start < cfg.indexer_warmup_steps
        self.model.set_stage("dense" if warming_up else "sparse")
        rates = self.engine.learning_rates()
        probing = is_due(cfg.probe_interval, progress.step + 1)
        sums = forward_backward(
            self.engine,
            self.loader,
            cfg,
            plan,
            step=progress.step,
            n_targets=self.data.n_targets(first, plan.global_batch_size),
            probing=probing,
            measuring=is_due(cfg.health_interval, progress.step + 1),
            phase=self._enter_phase,
            drop=self._drops_update if self.spikes.drops_updates else None,
        )
        progress.advance(first, plan.global_batch_size, cfg.max_seq_len)
        totals = reduce_step(
            sums,
            flags=(self.stop.number, self.data.fault is not None, *self.saver.status()),
            rank_shares=self.telemetry.shares(sums.selection),
            world_size=self.world.size,
        )
        if not sums.dropped:
            self.model.update_v_ref(totals.selection)
        signals, faults, done, failed = totals.flags
        if faults:  # before anything of this step, or of a save in flight, is published
            raise_fault(self.world.gather(self.data.fault))
        self.saver.poll(done, failed)
        row = {
            "step": progress.step,
            "epoch": self._epoch(),
            "samples": progress.samples_consumed,
            "tokens": progress.tokens_seen,
            "loss": totals.loss,
            "spike_score": self.spikes.score(totals.loss),
            "indexer_loss": totals.indexer_loss,
            "grad_norm": self.engine.grad_norm(),
            "lr": rates["decay"],
            "lr_indexer": rates.get("indexer", 0.0),
            "stage": self.model.stage,
            "selected_k": totals.selected,
            "visible_k": totals.visible,
        }
        action = self.spikes.decide(row, dropped=sums.dropped, rollbacks=progress.rollbacks)
        samples = [first, plan.global_batch_size]
        if action == "stop":
            self.recorder.last_row(row)
            newest = self.folder.latest()
            raise diverged(row, sums, samples, plan=plan, data=self.data, world=self.world, last_good=newest)
        row |= totals.measurements(probing=probing)
        row |= self.telemetry.of_step(began, totals.rank_shares, selected=totals.selected, visible=totals.visible)
        row["time"] = time.time()
        stop_signal = self.stop.agree(self.world.device) if signals else 0
        return Step(row, action, samples, stop_signal)

    def _enter_phase(self, name: str) -> None:
        # the first step of a process compiles, allocates and opens connections
        self.watchdog.beat(name if self.progress.step > self._first_step else "first step")
        self.telemetry.enter_phase(name)

    def _drops_update(self, sums: StepSums) -> bool:
        """Before the update: whether to discard the step's gradient. Waits for the device."""
        means = sum_over_ranks({"means": sums.means() / self.world.size})["means"]
        loss, indexer_loss, *_ = means.tolist()
        return self.spikes.drops(loss, indexer_loss)

    def _record(self, step: Step) -> None:
        """The step stays part of the run: its loss counts, and its row is written."""
        row, spike, message = step.row, None, None
        self.spikes.accept(row["loss"])
        if self.spikes.is_spike(row):
            skipped = step.action == "skip"
            spike = spike_event(row, step.samples, "skip" if skipped else "log")
            message = describe(row) + ("; its update was dropped" if skipped else "")
        self.recorder.step(row, spike, message)

    def _roll_back(self, step: Step) -> bool:
        """Restores the last good checkpoint and rules the step's samples out; False when there is no checkpoint yet.

        Raises Diverged when there is none and the step's numbers are not finite.
        """
        row = step.row
        self._finish_save()
        found = checkpoint_to_restore(row, self.folder, self.world, self.recorder)
        if found is None:
            return False
        ruled_out = [*self.progress.skipped, step.samples]
        self.engine.load(found)
        self._apply_state(position_in_text(read_run_state(found), self.data))
        self.progress.rule_out(ruled_out)
        event = spike_event(row, step.samples, "rollback") | {"checkpoint": found.name}
        step, tag = self.progress.step, found.name
        self.world.from_main(lambda: self.recorder.roll_back(row, event, step=step, checkpoint=tag))
        first, last = event["samples"]
        self.recorder.line(f"{describe(row)}; back to {found.name}, past samples {first}..{last}")
        self._read_history()
        self.loader.close()
        self._open_loader()
        self.saver.saved_at = self.progress.step
        return True

    # -- evaluation and checkpoints --------------------------------------------------------------------

    def _judge(self) -> int:
        """Evaluates and samples when it is time to. Returns the stop signal that broke it off, or 0."""
        try:
            for judge in self.evaluator.due(self.progress.step):
                with self.telemetry.stalled("seconds_eval"):
                    for event, line in judge(self.progress.step):
                        self._report(event, line)
        except Interrupted:
            return self.stop.agree(self.world.device)
        except EvaluationError:  # on all ranks; it may not cost a step
            self._save_last()
            raise
        return 0

    def _report(self, event: dict, *lines: str) -> None:
        self.recorder.event(event)
        for line in lines:
            self.recorder.line(line)

    def _save_due(self) -> bool:
        # while losses are not finite the weights may be broken: none of the good ones is to make room for them
        due = is_due(self.cfg.save_interval, self.progress.step) and not self.spikes.lost_in_a_row
        return (due or self.progress.step == self.spec.last_step) and self.saver.saved_at != self.progress.step

    def _state(self) -> RunState:
        return self.progress.to_state(
            epoch=self._epoch(),
            config=to_plain(self.spec.cfg),
            data_fingerprint=self.data.fingerprint,
            tokenizer_sha256=self.data.tokenizer_sha256,
            tokenizer_entries=self.data.vocab_size,
            eod_id=self.data.eod_id,
            tracking_id=self.tracking_id,
            stage=self.model.stage,
            versions=versions(self.engine.deepspeed_version),
            world_size=self.world.size,
            zero_stage=self.engine.zero_stage,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _save(self) -> None:
        self.watchdog.beat("save")
        with self.telemetry.stalled("seconds_save"):
            self.saver.start(self._state())

    def _finish_save(self) -> None:
        self.watchdog.beat("save")
        self.saver.finish()

    def _save_last(self) -> None:
        """Nobody exits before the checkpoint of this step exists. Raises CheckpointError when it cannot be saved."""
        self._finish_save()
        if self.saver.saved_at != self.progress.step:
            self.saver.save_last(self._state(), self.cfg.emergency_dir)


@contextmanager
def collecting_garbage_together() -> Iterator[None]:
    """Switches Python's own garbage collection off; what exists by now is not walked again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
