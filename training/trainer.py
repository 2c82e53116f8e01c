"""The training loop: one story from top to bottom."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gsa import GSAForCausalLM
from gsa.attention.probe import PROBES
from gsa.checkpoint import manifest
from gsa.checkpoint.legacy import read_legacy
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import RunState
from gsa.kernels.choice import Shape, resolve
from gsa.weights import load_weights
from training import config as run_config
from training.clock import StepClock
from training.config import BatchPlan, RunConfig
from training.data import Loader, PackedTokens, permute
from training.engine import DEEPSPEED_VERSION, Engine
from training.evaluate import evaluate, unigram_score
from training.metrics import Console, MetricsLog, rewind
from training.optimizer import build_optimizer, build_schedule
from training.resume import Start
from training.run_folder import PROJECT, RunFolder, version
from training.saving import Retention, Saver, SaveReport
from training.space import checkpoint_bytes
from training.telemetry import SETTLED, Telemetry
from training.tracking import Tracker, new_run_id
from training.watchdog import Watchdog
from training.world import World

PROBED_ROWS = 64
"""Queries of one sequence that are measured every probe_interval steps: a four-hundredth of a step of 8 x 2048."""

GARBAGE_INTERVAL = 50
"""Steps between collections of Python's garbage, alike on all ranks: one that pauses by itself keeps others waiting."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Save at the next step boundary, then end in order."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def indexer_rows(seed: int, step: int, seq_len: int, share: float) -> torch.Tensor:
    """(R,) int64 sorted row positions for the alignment loss of the step after `step` finished ones.

    A pure function of its arguments, so the same for every sequence, rank and recomputation of a step.
    """
    count = max(1, round(seq_len * share))
    drawn = permute(np.arange(count), seq_len, (seed, "indexer rows", step))
    return torch.from_numpy(np.sort(drawn))


def probe_metrics(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """The row's PROBE_METRICS from sums over ranks, and how many ranks had each, (n_layers, len(PROBES)) twice.

    A rank whose sequence has nothing to measure in a layer counts for nothing there; what no layer has is left out.
    """
    by_name = dict(zip(PROBES, (sums / counts).cpu().unbind(1), strict=True))
    found = {
        "indexer/coverage": by_name["coverage"].nanmean(),
        "indexer/coverage_worst": by_name["coverage"].nan_to_num(torch.inf).min(),
        "indexer/oracle": by_name["oracle"].nanmean(), "indexer/recall": by_name["recall"].nanmean(),
        "gate/value_saturation": by_name["value_saturation"].nanmean(),
        "gate/output_saturation": by_name["output_saturation"].nanmean(),
        "attention/first_token": by_name["first_token"].nanmean(),
    }  # fmt: skip
    return {name: value.item() for name, value in found.items() if value.isfinite()}


def _latest(folder: RunFolder) -> str | None:
    """What `latest` names; None when it cannot be read, which the next publication mends."""
    try:
        return manifest.latest_tag(folder.path)
    except CheckpointError:
        return None


def _seconds_of(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Trainer:
    """Owns a run from its first step to its last checkpoint.

    start: the verified checkpoint to continue and where its state leads, or None. The folder has been claimed,
    the configuration checked. Losses are normalised by the counts of the whole global batch: the engine divides by
    accumulation and by ranks, so a micro-batch's sum is divided by count / (accumulation x ranks).
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
    ) -> None:
        self.cfg, self.plan, self.world, self.folder = cfg, plan, world, folder
        self.data, self.held_out, self.watchdog = data, held_out, watchdog
        self.step = self.samples = self.tokens = self.indexer_start = 0
        self.epoch_offset = 0.0
        self.decided: dict = {}
        self._stop_signal = 0
        self._unigram_bpb: float | None = None

        self.telemetry = Telemetry(cfg, plan, ds_config, world)
        # the CPU generator alone decides the weights: alike on every rank, stage and device
        torch.manual_seed(cfg.training.seed)
        model = GSAForCausalLM(cfg.model)
        if start is None and cfg.training.init_from:
            model.load_state_dict(load_weights(Path(cfg.training.init_from))[1])
        backend, fault = self._backend()
        model.set_backend(backend)
        model.set_activation_checkpointing(cfg.training.recomputed)
        if cfg.training.compile:
            model.compile_parts()
        self.n_layers = cfg.model.n_layers
        optimizer = build_optimizer(model, cfg.training)
        self.engine = Engine(model, optimizer, build_schedule(optimizer, cfg.training), ds_config)
        self.model: GSAForCausalLM = self.engine.module

        self.console = Console(world.is_main, self._end(), log_interval=cfg.training.log_interval)
        if fault is not None:
            self.console.line(f"warning: attention runs on the chunked kernels, not on Triton's: {fault}")
        run = folder.read_run()
        self._continued = (
            start is not None
            and not start.legacy
            and start.state.step > 0
            and (start.checkpoint.parent.resolve() == folder.path.resolve())
        )
        kept = (run.get("tracking_id") or start.state.tracking_id) if self._continued else None
        self.tracking_id = world.broadcast(kept or new_run_id())
        if start is not None:
            self._take_up(start)
        self._first_step = self.step
        self.world.barrier()  # every rank has read run.json before rank 0 writes it
        self.log: MetricsLog | None = None
        if world.is_main:
            if self._continued and _latest(folder) != start.checkpoint.name:
                # a kill came before it was published, or what `latest` names is about to be set aside
                manifest.publish(folder.path, start.checkpoint.name)
            self._open_run(start, moved=self._set_aside())
        self.saver = Saver(
            self.engine,
            world,
            folder.path,
            background=cfg.training.async_save,
            bytes_needed=checkpoint_bytes(cfg, start and start.checkpoint),
            retention=Retention(cfg.training.keep_last, cfg.training.keep_every),
            published=self._published,
        )
        self.tracker = Tracker(
            cfg.logging, output_dir=folder.path, run_id=self.tracking_id, config=run_config.to_plain(cfg),
            enabled=world.is_main,
        )  # fmt: skip

    # -- before the first step -------------------------------------------------------------------------

    def _backend(self) -> tuple[str, str | None]:
        """One for all ranks, "auto" resolved; and what kept the first rank that found a fault from the fastest."""
        c = self.cfg.model
        dtype = torch.bfloat16 if self.cfg.training.precision == "bf16" else torch.float32
        shape = Shape(c.n_heads, c.n_kv_heads, c.d_head, c.n_indexer_heads, c.d_indexer, dtype)
        found = self.world.gather(resolve(self.cfg.training.backend, shape, self.world.device))
        return next(((backend, fault) for backend, fault in found if fault), found[0])

    def _end(self) -> int:
        stop = self.cfg.training.stop_at_step
        return self.cfg.training.max_steps if stop is None else min(stop, self.cfg.training.max_steps)

    def _take_up(self, start: Start) -> None:
        self.watchdog.beat("load")
        if start.legacy:
            self.engine.take_up(read_legacy(start.checkpoint, self.cfg.model, start.state))
        else:
            self.engine.load(start.checkpoint)
        # what the yaml says runs: DeepSpeed brings back the saved rates, decay, betas and clipping
        self.engine.apply_hyperparameters(self.cfg.training)
        state = start.state
        self.step, self.samples, self.tokens = state.step, state.samples_consumed, state.tokens_seen
        self.indexer_start, self.epoch_offset, self.decided = state.indexer_start, state.epoch_offset, state.decided
        to_do = f"continuing at step {self.step + 1} of {self._end()}" if self.step < self._end() else "at its end"
        self.console.line(f"resumed {start.checkpoint.name}: {to_do}, epoch {self._epoch():.3f}")

    def _epoch(self) -> float:
        return self.epoch_offset + self.data.epoch(self.samples)

    def _set_aside(self) -> int:
        # also for a fresh start: a run that died before its first checkpoint has left rows behind
        for line in self.folder.set_aside(self.step):
            self.console.line(line)
        return rewind(self.folder.metrics, self.step)

    def _open_run(self, start: Start | None, moved: int) -> None:
        self.log = MetricsLog(self.folder.metrics)
        self.folder.update_run(
            status="running", reason=None, step=self.step, tracking_id=self.tracking_id, world_size=self.world.size,
            zero_stage=self.engine.zero_stage, backend=self.model.layers[0].attention.backend,
        )  # fmt: skip
        event = {"event": "start" if start is None else "resume", "step": self.step, "world_size": self.world.size,
                 "zero_stage": self.engine.zero_stage}  # fmt: skip
        if start is not None:
            event |= {"checkpoint": start.checkpoint.name, "rows_moved": moved}
        self._event(event)
        self._event({**self.telemetry.describe(), "step": self.step})

    def _event(self, row: dict) -> None:
        assert "loss" not in row
        if self.log is not None:
            self.log.write({**row, "time": time.time()})

    def close(self, exit_code: int = 0) -> None:
        """Ends tracking and frees the engine; the process group stays."""
        self.console.close()
        self.telemetry.close()
        self.tracker.finish(exit_code)
        if self.log is not None:
            self.log.close()
        self.engine.destroy()

    # -- the loop --------------------------------------------------------------------------------------

    def train(self) -> str:
        """Trains to the stop or the end. Returns the reason it ended: "finished", "stop_at_step" or a signal's name.

        Raises Diverged when the loss or the gradient norm is not finite; the last checkpoint stays good.
        """
        cfg = self.cfg.training
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        loader = Loader(
            self.data, samples_consumed=self.samples, plan=self.plan, rank=self.world.rank,
            num_workers=self.cfg.data.num_workers, pin_memory=self.world.device.type == "cuda",
        )  # fmt: skip
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
            while self.step < self._end() and not stop_signal:
                row, stop_signal = self._one_step(loader, clock)
                row |= stood | {"time": time.time()}
                stood = dict.fromkeys(stood, 0.0)
                self._tell(row)
                pace = row["seconds"] if pace is None else 0.9 * pace + 0.1 * row["seconds"]
                self.console.step(row, pace * (self._end() - self.step))
                last = self.step == self._end() or bool(stop_signal)
                if (cfg.eval_interval and self.step % cfg.eval_interval == 0) or self.step == self._end():
                    stood["seconds_eval"] = _seconds_of(self._evaluate)
                if last or (cfg.save_interval and self.step % cfg.save_interval == 0):
                    stood["seconds_save"] = _seconds_of(self._save)
                    saved_at = self.step
                if self.step % GARBAGE_INTERVAL == 0:
                    gc.collect()
        except Diverged:
            try:
                self._finish_save()  # all ranks are here: what was good before is kept
            except CheckpointError as err:
                self.console.line(f"warning: the last save failed too: {err}")
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
        self._event({"event": "stop", "step": self.step, "reason": reason})
        if self.world.is_main:
            status = "finished" if reason == "finished" else "stopped"
            self.folder.update_run(status=status, reason=reason, step=self.step)
        return reason

    def _tell(self, row: dict) -> None:
        if self.log is not None:
            self.log.write(row)
            if self.step == self._first_step + SETTLED:
                self._event({**self.telemetry.predicted(row["seconds"]), "step": self.step})
        self.tracker.log(row, step=self.step)
        for message in self.telemetry.messages():
            self.console.line(f"warning: {message}")

    def _one_step(self, loader: Loader, clock: StepClock) -> tuple[dict, int]:
        """One optimizer step. Returns its row, all but what the loop knows, and an agreed signal or 0."""
        began = time.perf_counter()
        cfg, plan = self.cfg.training, self.plan
        first = self.samples
        self.model.set_stage("dense" if self.step - self.indexer_start < cfg.indexer_warmup_steps else "sparse")
        n_targets = self.data.n_targets(first, plan.global_batch_size)
        share = max(1, n_targets) / (plan.accumulation_steps * plan.world_size)
        rows = indexer_rows(cfg.seed, self.step, cfg.max_seq_len, cfg.indexer_loss_rows).to(self.world.device)
        rates = self.engine.learning_rates()
        probing = bool(cfg.probe_interval) and (self.step + 1) % cfg.probe_interval == 0
        probe_rows = None
        if probing:
            share_probed = min(1.0, PROBED_ROWS / cfg.max_seq_len)
            probe_rows = indexer_rows(cfg.seed, self.step, cfg.max_seq_len, share_probed).to(self.world.device)
        probes = torch.zeros(self.n_layers, len(PROBES), dtype=torch.float64, device=self.world.device)
        losses, indexer_losses, selected, seen = [], [], [], []
        selection = torch.zeros(self.n_layers, 2, dtype=torch.float64, device=self.world.device)
        for _ in range(plan.accumulation_steps):
            self._phase(clock, "data")
            batch = next(loader).to(self.world.device, non_blocking=True)
            self._phase(clock, "forward")
            out = self.engine.forward(
                batch.tokens, batch.targets, batch.doc_start, indexer_rows=rows, probe_rows=probe_rows, n_targets=share
            )
            if probe_rows is not None:  # of the step's first micro-batch
                probes, probe_rows = out.probe.double(), None
            self._phase(clock, "backward")
            self.engine.backward(out.loss + cfg.indexer_loss_weight * out.indexer_loss)
            self._phase(clock, "step")
            self.engine.step()
            losses.append(out.loss.detach())
            indexer_losses.append(out.indexer_loss.detach())
            selected.append(out.n_selected.mean())
            seen.append((cfg.max_seq_len + 1) / 2 - batch.doc_start.double().mean())
            selection += out.selection_stats
        self.step += 1
        self.samples += plan.global_batch_size
        self.tokens += plan.global_batch_size * cfg.max_seq_len

        # one small collective and one wait for the device per step, whatever the accumulation
        per_micro = (losses, indexer_losses, selected, seen)
        means = torch.stack([torch.stack(part).double().mean() for part in per_micro])
        # filled on the device: a tensor made of Python numbers would be copied there, and wait for it
        flags = torch.cat([means.new_full((1,), float(flag)) for flag in (self._stop_signal, *self.saver.flags())])
        measured = ~probes.isnan()
        shares = self.telemetry.shares(means)
        parts = [means / self.world.size, flags, selection, shares, probes.nan_to_num(0), measured]
        shared = torch.cat([part.flatten().double() for part in parts])
        dist.all_reduce(shared)
        means, flags, selection, shares, probes, measured = (
            part.view_as(like) for part, like in zip(shared.split([p.numel() for p in parts]), parts, strict=True)
        )
        self.model.update_v_ref(selection)
        loss, indexer_loss, n_selected, n_seen = means.tolist()
        signal_sum, settled, failed = flags.tolist()
        self.saver.advance(settled, failed)
        grad_norm = self.engine.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(indexer_loss) and math.isfinite(grad_norm)):
            self._diverged(losses, indexer_losses, first, loss, grad_norm)
        row = {
            "step": self.step, "epoch": self._epoch(), "samples": self.samples, "tokens": self.tokens,
            "loss": loss, "indexer_loss": indexer_loss, "grad_norm": grad_norm, "lr": rates["decay"],
            "lr_indexer": rates.get("indexer", 0.0), "stage": self.model.stage, "selected_k": n_selected,
            "visible_k": n_seen,
        }  # fmt: skip
        if probing:
            row |= probe_metrics(probes, measured)
        phases = clock.read()
        row |= {f"seconds_{name}": spent for name, spent in phases.items()}
        row |= self.telemetry.of_step(time.perf_counter() - began, phases, shares, n_selected, n_seen)
        return row, self._agree_on_signal() if signal_sum else 0

    def _phase(self, clock: StepClock, name: str) -> None:
        # the first step of a process compiles, allocates and opens connections
        self.watchdog.beat(name if self._warm else "first step")
        clock.lap(name)

    @property
    def _warm(self) -> bool:
        return self.step > self._first_step

    def _diverged(
        self,
        losses: list[torch.Tensor],
        indexer_losses: list[torch.Tensor],
        first: int,
        loss: float,
        grad_norm: float,
    ) -> None:
        """Every rank is here, since the sums are the same on all: find out whose micro-batches did it, and raise."""
        plan = self.plan
        bad = [
            m for m, pair in enumerate(zip(losses, indexer_losses, strict=True))
            if not all(math.isfinite(float(x)) for x in pair)
        ]  # fmt: skip
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

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_signal = number
        for again in STOP_SIGNALS:  # a second one ends the process at once, even inside a collective
            signal.signal(again, signal.SIG_DFL)

    def _agree_on_signal(self) -> int:
        """The highest signal any rank has seen; called on all ranks when at least one has seen one."""
        seen = torch.tensor([self._stop_signal], device=self.world.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return int(seen)

    # -- evaluation and checkpoints --------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Scores the sparse model, which is what will be used; in the dense stage that one too."""
        began = time.perf_counter()
        cfg, stage = self.cfg.training, self.model.stage
        self.watchdog.beat("evaluate")
        row: dict = {"event": "eval", "step": self.step}
        for scored, suffix in [("sparse", "")] + ([("dense", "_dense")] if stage == "dense" else []):
            self.model.set_stage(scored)
            score = evaluate(
                self.engine, self.held_out, self.world, n_windows=cfg.eval_windows,
                micro_batch_size=self.plan.micro_batch_size,
            )  # fmt: skip
            row |= {
                f"eval_loss{suffix}": score.loss,
                f"eval_bpb{suffix}": score.bpb,
                "eval_tokens": score.tokens,
            }
        self.model.set_stage(stage)
        if not self.world.is_main:
            return
        if self._unigram_bpb is None:
            self._unigram_bpb = unigram_score(self.held_out, n_windows=cfg.eval_windows).bpb
        row |= {"unigram_bpb": self._unigram_bpb, "eval_seconds": time.perf_counter() - began}
        self._event(row)
        self.tracker.log({k: v for k, v in row.items() if k.startswith("eval_")}, step=self.step)
        dense = f", dense {row['eval_bpb_dense']:.4f}" if "eval_bpb_dense" in row else ""
        self.console.line(
            f"step {self.step}: held-out {row['eval_bpb']:.4f} bits per byte{dense} (unigram "
            f"{self._unigram_bpb:.4f}), loss {row['eval_loss']:.4f}, {row['eval_seconds']:.1f} s"
        )

    def _save(self) -> None:
        self.watchdog.beat("save")
        self.saver.start(RunState(
            step=self.step, epoch=self._epoch(), samples_consumed=self.samples, tokens_seen=self.tokens,
            config=run_config.to_plain(self.cfg), data_fingerprint=self.data.fingerprint, tracking_id=self.tracking_id,
            stage=self.model.stage,
            versions={"torch": str(torch.__version__), "deepspeed": DEEPSPEED_VERSION, "project": version(PROJECT)},
            world_size=self.world.size, zero_stage=self.engine.zero_stage,
            created=datetime.now(UTC).isoformat(timespec="seconds"), epoch_offset=self.epoch_offset,
            indexer_start=self.indexer_start, decided=self.decided,
        ))  # fmt: skip

    def _finish_save(self) -> None:
        """Nobody exits before the checkpoint exists."""
        self.watchdog.beat("save")
        self.saver.finish()

    def _published(self, report: SaveReport) -> None:
        self._event({
            "event": "save", "step": report.step, "tag": report.tag, "bytes": report.bytes,
            "save_stall_seconds": report.stall_s, "save_background_seconds": report.background_s,
            "save_background_cpu_seconds": report.background_cpu_s,
        })  # fmt: skip
        self.console.line(
            f"saved {report.tag}: {report.bytes / 2**20:.1f} MiB, training stood still for {report.stall_s:.2f} s, "
            f"written in {report.stall_s + report.background_s:.2f} s"
        )
        for removed in report.removed:
            self.console.line(f"removed {removed.tag}: {removed.reason}")
