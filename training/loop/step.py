"""One optimizer step: its forward and backward passes over the micro-batches, and the one all-reduce that ends it.

A training run and a trial of `training.tune` run the same passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from gsa.attention.probe import PROBES
from training.config import BatchPlan, TrainingConfig
from training.data.dataset import Batch
from training.data.order import permute
from training.engine.zero_internals import MasterSubset
from training.observe.health import health_metrics, probe_metrics

if TYPE_CHECKING:  # importing DeepSpeed takes seconds
    from training.engine.engine import Engine

PROBED_ROWS = 64
"""Query positions probed every probe_interval steps; about 1/400 of the queries of a step of 8 x 2048 tokens."""


def indexer_rows(seed: int, step: int, seq_len: int, share: float) -> torch.Tensor:
    """(R,) int64 sorted query positions for the alignment loss of the step that follows `step` finished ones.

    A pure function of its arguments, so it is the same for every sequence, rank and recomputation of a step.
    """
    count = max(1, round(seq_len * share))
    drawn = permute(np.arange(count), seq_len, (seed, "indexer rows", step))
    return torch.from_numpy(np.sort(drawn))


def sum_over_ranks(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each part summed over ranks, float64, in one collective."""
    flat = torch.cat([part.flatten().double() for part in parts.values()])
    dist.all_reduce(flat)
    chunks = flat.split([part.numel() for part in parts.values()])
    return {name: chunk.view_as(part) for (name, part), chunk in zip(parts.items(), chunks, strict=True)}


@dataclass
class StepSums:
    """Per-rank results of one step, still on the device; not yet synchronised or reduced.

    losses, indexer_losses, selected, visible: one number per micro-batch; selected: keys attended to per query;
    visible: keys that a query could have attended to. selection: (n_layers, 2), for update_v_ref. probes: (n_layers,
    len(PROBES)), zeros where the step does not probe. squares, updates: of the gradient and of the update, where the
    step measures them. dropped: the gradient was discarded.
    """

    selection: torch.Tensor
    probes: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    indexer_losses: list[torch.Tensor] = field(default_factory=list)
    selected: list[torch.Tensor] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)
    squares: torch.Tensor | None = None
    updates: MasterSubset | None = None
    dropped: bool = False

    def means(self) -> torch.Tensor:
        """(4,) float64 over this rank's micro-batches: loss, indexer loss, keys selected, keys visible."""
        parts = (self.losses, self.indexer_losses, self.selected, self.visible)
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
    measuring: bool,
    phase: Callable[[str], None],
    drop: Callable[[StepSums], bool] | None = None,
) -> StepSums:
    """Runs one optimizer step with the attention stage that the model is in; every rank must call it.

    step: steps finished before this one. n_targets: target tokens of its global batch, by which losses are normalised:
    the engine divides by accumulation and ranks, so a micro-batch's sum is divided by n_targets / (accumulation x
    ranks). probing, measuring: whether the step probes attention, and measures gradients and updates. phase: called
    with "data", "forward", "backward" and "step" as each begins, and with "other" when the last has ended. drop: called
    before the update; its answer says whether to discard the gradient.
    """
    device = engine.device
    share = max(1, n_targets) / (plan.accumulation_steps * plan.world_size)
    rows = indexer_rows(cfg.seed, step, cfg.max_seq_len, cfg.indexer_loss_rows).to(device)
    probe_rows = None
    if probing:
        probe_rows = indexer_rows(cfg.seed, step, cfg.max_seq_len, min(1.0, PROBED_ROWS / cfg.max_seq_len)).to(device)
    n_layers = len(engine.module.layers)
    sums = StepSums(
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
        if probe_rows is not None:  # only the step's first micro-batch is probed
            sums.probes, probe_rows = out.probe.double(), None
        phase("backward")
        engine.backward(out.loss + cfg.indexer_loss_weight * out.indexer_loss)
        phase("step")
        sums.losses.append(out.loss.detach())
        sums.indexer_losses.append(out.indexer_loss.detach())
        sums.selected.append(out.n_selected.mean())
        sums.visible.append((cfg.max_seq_len + 1) / 2 - batch.doc_start.double().mean())
        sums.selection += out.selection_stats
        last = micro == plan.accumulation_steps - 1
        if measuring and last:
            sums.squares, sums.updates = engine.gradient_squares(), engine.master_subset()
        sums.dropped = last and drop is not None and drop(sums)
        engine.step(drop=sums.dropped)
    phase("other")
    return sums


@dataclass(frozen=True)
class StepTotals:
    """A step's numbers over all ranks, the same on each of them.

    selected, visible: keys per query. flags: those of all ranks, added up. rank_shares: as Telemetry.shares made them.
    """

    loss: float
    indexer_loss: float
    selected: float
    visible: float
    flags: list[float]
    selection: torch.Tensor
    rank_shares: torch.Tensor
    _reduced: dict[str, torch.Tensor]

    def measurements(self, *, probing: bool) -> dict[str, object]:
        """PROBE_METRICS and HEALTH_METRICS of the row, of a step that took them."""
        row: dict[str, object] = {}
        if probing:
            row |= probe_metrics(self._reduced["probes"], self._reduced["probed"])
        if "updates" in self._reduced:
            row |= health_metrics(self._reduced.get("squares"), self._reduced["updates"])
        return row


def reduce_step(sums: StepSums, *, flags: Sequence[float], rank_shares: torch.Tensor, world_size: int) -> StepTotals:
    """One small collective and one wait for the device per step, whatever the accumulation.

    flags: of this rank. rank_shares: this rank's part, zeros for the others.
    """
    like = sums.selection
    parts = {
        "means": sums.means() / world_size,
        # filled on the device: a tensor made of Python numbers would be copied there, and wait for it
        "flags": torch.stack([like.new_full((), float(flag)) for flag in flags]),
        "selection": sums.selection,
        "ranks": rank_shares,
        "probes": sums.probes.nan_to_num(0),
        "probed": ~sums.probes.isnan(),
    }
    if sums.updates is not None:
        parts["updates"] = sums.updates.squares().to(like)
    if sums.squares is not None:
        parts["squares"] = sums.squares
    reduced = sum_over_ranks(parts)
    return StepTotals(
        *reduced["means"].tolist(),
        flags=reduced["flags"].tolist(),
        selection=reduced["selection"],
        rank_shares=reduced["ranks"],
        _reduced=reduced,
    )
