"""A training step in three ways: Trainer, a bare loop over the engine, and torch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.comparing import BF16_TOLERANCE, TOLERANCE
from gsa import GSAForCausalLM
from gsa.kernels.choice import Shape, resolve
from training.config import BatchPlan, RunConfig, RunSpec, plan_batch, to_yaml
from training.config.deepspeed import resolve_ds_config
from training.data.dataset import PackedTokens
from training.data.loader import step_samples
from training.engine.optimizer import build_optimizer, build_schedule, parameter_groups
from training.engine.world import World
from training.loop.step import indexer_rows
from training.loop.watchdog import Watchdog
from training.record.run_folder import RunFolder

if TYPE_CHECKING:
    from training.engine.engine import Engine
    from training.loop.trainer import Trainer

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


@dataclass(frozen=True)
class Micro:
    """One micro-batch of this rank on its device, with the other arguments that Trainer passes to the model."""

    tokens: Tensor
    targets: Tensor
    doc_start: Tensor
    rows: Tensor
    share: float


@dataclass(frozen=True)
class Case:
    """A configuration, its data, and the ranks it runs on."""

    cfg: RunConfig
    plan: BatchPlan
    data: PackedTokens
    world: World

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cfg.training.precision == "bf16" else torch.float32

    @property
    def tokens_per_step(self) -> int:
        return self.plan.global_batch_size * self.cfg.training.max_seq_len

    @property
    def tolerance(self) -> float:
        """How far two losses may differ where rounding may differ: see benchmarks/comparing.py."""
        return BF16_TOLERANCE if self.dtype == torch.bfloat16 else TOLERANCE

    @property
    def shape(self) -> str:
        plan = self.plan
        return f"{plan.micro_batch_size} x {self.cfg.training.max_seq_len}, accumulation {plan.accumulation_steps}"

    def ds_config(self, stage: int) -> dict:
        return resolve_ds_config(DS_CONFIGS / f"zero{stage}.json", self.cfg, self.plan, Path(__file__))

    def micros(self, steps: int) -> list[list[Micro]]:
        """The micro-batches that a Trainer reads on this rank in its first `steps` steps."""
        return [self._of_step(step) for step in range(steps)]

    def _of_step(self, step: int) -> list[Micro]:
        cfg, plan, device = self.cfg.training, self.plan, self.world.device
        first = step * plan.global_batch_size
        share = self.data.n_targets(first, plan.global_batch_size) / (plan.accumulation_steps * plan.world_size)
        rows = indexer_rows(cfg.seed, step, cfg.max_seq_len, cfg.indexer_loss_rows).to(device)
        batches = [self.data.batch(samples).to(device) for samples in step_samples(first, plan, self.world.rank)]
        return [Micro(b.tokens, b.targets, b.doc_start, rows, share) for b in batches]

    def model(self) -> GSAForCausalLM:
        """The model as Trainer builds it: the same on every rank, on the CPU in float32."""
        c = self.cfg.model
        torch.manual_seed(self.cfg.training.seed)
        model = GSAForCausalLM(c)
        shape = Shape(c.n_heads, c.n_kv_heads, c.d_head, c.n_indexer_heads, c.d_indexer, self.dtype)
        model.set_backend(resolve(self.cfg.training.backend, shape, self.world.device)[0])
        model.set_activation_checkpointing(self.cfg.training.recomputed)
        return model


def case_of(cfg: RunConfig, world: World) -> Case:
    sources = {cfg.data.data_dir: 1.0}
    data = PackedTokens(sources, split="train", max_seq_len=cfg.training.max_seq_len, seed=cfg.training.seed)
    return Case(cfg, plan_batch(cfg.training, world.size), data, world)


class Bare:
    """Only `engine(batch); engine.backward(loss); engine.step()`, at one ZeRO stage."""

    def __init__(self, case: Case, stage: int) -> None:
        from training.engine.engine import Engine

        model = case.model()
        optimizer = build_optimizer(model, case.cfg.training)
        schedule = build_schedule(optimizer, case.cfg.training)
        self.engine: Engine = Engine(model, optimizer, schedule, case.ds_config(stage))
        self.engine.train()
        self._weight = case.cfg.training.indexer_loss_weight

    def step(self, micros: Sequence[Micro]) -> list[Tensor]:
        """Runs one step; returns the token loss of each micro-batch, on the device."""
        losses = []
        for m in micros:
            out = self.engine.forward(m.tokens, m.targets, m.doc_start, indexer_rows=m.rows, n_targets=m.share)
            self.engine.backward(out.loss + self._weight * out.indexer_loss)
            self.engine.step()
            losses.append(out.loss.detach())
        return losses

    def close(self) -> None:
        self.engine.destroy()


class Plain:
    """The same step with DistributedDataParallel and torch's AdamW: every rank holds the whole state."""

    def __init__(self, case: Case) -> None:
        cfg, device = case.cfg.training, case.world.device
        model = case.model().to(device, case.dtype)
        self._weights = list(model.parameters())
        groups = parameter_groups(model, cfg)
        self._masters = self._weights
        if case.dtype != torch.float32:
            master_of = {p: p.detach().float() for p in self._weights}
            self._masters = list(master_of.values())
            for group in groups:
                group["params"] = [(name, master_of[p]) for name, p in group["params"]]
        self._optimizer = torch.optim.AdamW(groups)
        self._schedule = build_schedule(self._optimizer, cfg)
        on = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renamed broadcast_buffers; 2.11 does not know the new name
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=on, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._cfg = cfg

    def step(self, micros: Sequence[Micro]) -> list[Tensor]:
        losses = []
        for m in micros:
            with self._communicating(m is micros[-1]):
                out = self._ddp(m.tokens, m.targets, m.doc_start, indexer_rows=m.rows, n_targets=m.share)
                ((out.loss + self._cfg.indexer_loss_weight * out.indexer_loss) / len(micros)).backward()
            losses.append(out.loss.detach())
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self._masters, self._cfg.grad_clip)
        self._optimizer.step()
        self._schedule.step()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
            self._optimizer.zero_grad()
        self._ddp.zero_grad()
        return losses

    def _communicating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self._ddp.no_sync()

    def close(self) -> None:
        """Nothing to do: garbage collection frees its memory."""


@contextmanager
def trainer_of(case: Case, stage: int, folder: Path) -> Iterator[Trainer]:
    """A trainer as training/train.py builds it, in a new folder."""
    from training.loop.trainer import Trainer

    ds_config = case.ds_config(stage)
    run = RunFolder(folder)
    if case.world.is_main:
        run.write_inputs(config_yaml=to_yaml(case.cfg), ds_config=ds_config)
    case.world.barrier()
    with Watchdog(folder, rank=case.world.rank, size=case.world.size, timeout_s=600, launch="one") as watchdog:
        trainer = Trainer(
            RunSpec(case.cfg, case.plan, ds_config),
            world=case.world,
            folder=run,
            data=case.data,
            held_out=case.data,
            start=None,
            watchdog=watchdog,
        )
        try:
            yield trainer
        finally:
            trainer.close()
