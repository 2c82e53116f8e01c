"""The passes of one optimizer step over its micro-batches, alike for a run and for a trial of `training.tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from gsa.attention.probe import PROBES
from training.config import BatchPlan, TrainingConfig
from training.data import Batch
from training.data.order import permute
from training.engine.zero_internals import UpdateSample

if TYPE_CHECKING:  # DeepSpeed takes seconds to import
    from training.engine.engine import Engine

PROBED_ROWS = 64
"""Queries of one sequence that are measured every probe_interval steps: a four-hundredth of a step of 8 x 2048."""


def indexer_rows(seed: int, step: int, seq_len: int, share: float) -> torch.Tensor:
    """(R,) int64 sorted row positions for the alignment loss of the step after `step` finished ones.

    A pure function of its arguments, so the same for every sequence, rank and recomputation of a step.
    """
    count = max(1, round(seq_len * share))
    drawn = permute(np.arange(count), seq_len, (seed, "indexer rows", step))
    return torch.from_numpy(np.sort(drawn))


def summed(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each part summed over ranks, float64, in one collective."""
    flat = torch.cat([part.flatten().double() for part in parts.values()])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {name: piece.view_as(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


@dataclass
class StepSums:
    """What the passes of a step leave on this rank's device. Nothing has waited for it, nothing is summed over ranks.

    losses, indexer_losses, selected, seen: one number per micro-batch; selected: keys attended per query, seen: keys
    a query could have attended. selection: (n_layers, 2), for update_v_ref. probes: (n_layers, len(PROBES)), zeros
    where the step does not probe. squares, updates: of the gradient and the update, where the step examines them.
    dropped: the gradient was forgotten.
    """

    selection: torch.Tensor
    probes: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    indexer_losses: list[torch.Tensor] = field(default_factory=list)
    selected: list[torch.Tensor] = field(default_factory=list)
    seen: list[torch.Tensor] = field(default_factory=list)
    squares: torch.Tensor | None = None
    updates: UpdateSample | None = None
    dropped: bool = False

    def means(self) -> torch.Tensor:
        """(4,) float64 over this rank's micro-batches: loss, indexer loss, keys selected, keys seen."""
        parts = (self.losses, self.indexer_losses, self.selected, self.seen)
        return torch.stack([torch.stack(part).double().mean() for part in parts])


def forward_backward(
    engine: Engine,
    batches: Iterator[Batch],
    cfg: TrainingConfig,
    plan: BatchPlan,
    *,
    step: int,
    n_targets: int,
    probing: bool,
    examining: bool,
    phase: Callable[[str], None],
    drop: Callable[[StepSums], bool] | None = None,
) -> StepSums:
    """One optimizer step, of the stage that the model is in; every rank must call it.

    step: finished ones before it. n_targets: of its global batch; losses are normalised by it: the engine divides by
    accumulation and by ranks, so a micro-batch's sum is divided by n_targets / (accumulation x ranks). phase is told
    "data", "forward", "backward" and "step" as each begins, and "other" when the last has ended. drop is asked before
    the update whether to forget the gradient.
    """
    device = engine.device
    share = max(1, n_targets) / (plan.accumulation_steps * plan.world_size)
    rows = indexer_rows(cfg.seed, step, cfg.max_seq_len, cfg.indexer_loss_rows).to(device)
    probe_rows = None
    if probing:
        probe_rows = indexer_rows(cfg.seed, step, cfg.max_seq_len, min(1.0, PROBED_ROWS / cfg.max_seq_len)).to(device)
    n_layers = len(engine.module.layers)
    passes = StepSums(
        selection=torch.zeros(n_layers, 2, dtype=torch.float64, device=device),
        probes=torch.zeros(n_layers, len(PROBES), dtype=torch.float64, device=device),
    )
    for micro in range(plan.accumulation_steps):
        phase("data")
        batch = next(batches).to(device, non_blocking=True)
        phase("forward")
        out = engine.forward(
            batch.tokens, batch.targets, batch.doc_start, indexer_rows=rows, probe_rows=probe_rows, n_targets=share
        )
        if probe_rows is not None:  # of the step's first micro-batch
            passes.probes, probe_rows = out.probe.double(), None
        phase("backward")
        engine.backward(out.loss + cfg.indexer_loss_weight * out.indexer_loss)
        phase("step")
        passes.losses.append(out.loss.detach())
        passes.indexer_losses.append(out.indexer_loss.detach())
        passes.selected.append(out.n_selected.mean())
        passes.seen.append((cfg.max_seq_len + 1) / 2 - batch.doc_start.double().mean())
        passes.selection += out.selection_stats
        last = micro == plan.accumulation_steps - 1
        if examining and last:
            passes.squares, passes.updates = engine.gradient_squares(), engine.update_sample()
        passes.dropped = last and drop is not None and drop(passes)
        engine.step(drop=passes.dropped)
    phase("other")
    return passes
