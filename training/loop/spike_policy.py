"""What a loss spike, or a loss that is not a number, does to a run: training.on_spike, as decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from gsa.checkpoint.manifest import newest_good
from training.config import BatchPlan, TrainingConfig
from training.data.dataset import PackedTokens
from training.loop.step import StepSums
from training.record.spike_score import SpikeDetector

if TYPE_CHECKING:
    from training.engine.world import World
    from training.observe.recorder import SilentRecorder
    from training.record.run_folder import RunFolder

MAX_ROLLBACKS = 10
"""Maximum rollbacks per run. More than this means the data is not the problem; later spikes are only logged."""

MAX_LOST_IN_A_ROW = 10
"""With on_spike=skip, stop after this many consecutive non-finite steps: the weights themselves are broken."""

Action = Literal["continue", "log", "skip", "rollback", "stop"]
"""What to do with a step: nothing; log the spike; its update was dropped; restore the last good checkpoint; stop."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def is_finite(row: dict) -> bool:
    """Whether loss, indexer loss and gradient norm are finite.

    Rows read back from metrics.jsonl hold non-finite numbers as strings.
    """
    return all(math.isfinite(float(row.get(name, 0.0))) for name in ("loss", "indexer_loss", "grad_norm"))


class SpikePolicy:
    """Scores each step's loss and decides what follows. The same on every rank, since its inputs are sums over ranks.

    losses: those of the run so far, from metrics.jsonl. lost_in_a_row: how many of the last steps were not finite.
    """

    def __init__(self, cfg: TrainingConfig, losses: Iterable[float] = (), lost_in_a_row: int = 0) -> None:
        self._on_spike, self._sigmas = cfg.on_spike, cfg.spike_sigmas
        self._detector = SpikeDetector(losses)
        self.lost_in_a_row = lost_in_a_row

    def score(self, loss: float) -> float:
        """Standard deviations of `loss` above the mean of the last steps."""
        return self._detector.score(loss)

    def is_spike(self, row: dict) -> bool:
        return not is_finite(row) or row["spike_score"] > self._sigmas

    @property
    def drops_updates(self) -> bool:
        """Whether the loss must be known before the update, which costs a wait for the device."""
        return self._on_spike == "skip"

    def drops(self, loss: float, indexer_loss: float) -> bool:
        """Whether the update of a step with these losses is to be dropped; asked only where `drops_updates`."""
        return not (math.isfinite(loss) and math.isfinite(indexer_loss)) or self.score(loss) > self._sigmas

    def decide(self, row: dict, *, dropped: bool, rollbacks: int) -> Action:
        """Counts the step and says what to do with it.

        dropped: its update was dropped. rollbacks: how many spans of samples the run has ruled out already.
        """
        finite = is_finite(row)
        self.lost_in_a_row = 0 if finite else self.lost_in_a_row + 1
        if not self.is_spike(row):
            return "continue"
        if self._on_spike == "rollback" and rollbacks < MAX_ROLLBACKS:
            return "rollback"
        return self._without_rollback(row, dropped=dropped)

    def _without_rollback(self, row: dict, *, dropped: bool) -> Action:
        """What to do with a spike when nothing can be restored."""
        if is_finite(row) or (dropped and self.lost_in_a_row < MAX_LOST_IN_A_ROW):
            return "skip" if self._on_spike == "skip" else "log"
        return "stop"

    def accept(self, loss: float) -> None:
        """The step stays part of the run: its loss counts when the next ones are scored."""
        if math.isfinite(loss):
            self._detector.add(loss)


def spike_event(row: dict, samples: list[int], action: Action) -> dict:
    """The "spike" event of a step. samples: [first, count]."""
    first, count = samples
    return {
        "event": "spike",
        "step": row["step"],
        "spike_loss": row["loss"],
        "score": row["spike_score"],
        "samples": [first, first + count - 1],
        "action": action,
    }


def describe(row: dict) -> str:
    """Why the step is a spike, for the console."""
    text = f"step {row['step']}: loss {row['loss']:.4f}"
    if is_finite(row):
        return f"{text} is a spike, {row['spike_score']:.1f} sigmas"
    return f"{text}, indexer loss {row['indexer_loss']:.4f}, gradient norm {row['grad_norm']:.3g}: not finite"


def diverged(
    row: dict,
    sums: StepSums,
    samples: list[int],
    *,
    plan: BatchPlan,
    data: PackedTokens,
    world: World,
    last_good: str | None,
) -> Diverged:
    """The error of a step that the run cannot go on from; it names the ranks and samples whose losses are not finite.

    A collective: every rank must call it, and is there, since the step's sums are the same on all of them. sums: of
    this rank. samples: [first, count] of the step. last_good: the tag of the last checkpoint.
    """
    bad = [
        micro
        for micro, pair in enumerate(zip(sums.losses, sums.indexer_losses, strict=True))
        if not all(math.isfinite(float(x)) for x in pair)
    ]
    found = []
    for rank, micros in enumerate(world.gather(bad)):
        for micro in micros:
            start = samples[0] + (micro * plan.world_size + rank) * plan.micro_batch_size
            end = start + plan.micro_batch_size
            where = "; ".join(str(place) for place in data.describe(np.arange(start, end)))
            found.append(f"rank {rank}, samples {start}..{end - 1} ({where})")
    culprits = "\n  ".join(found) or (
        f"no single micro-batch: the gradient of samples {samples[0]}..{sum(samples) - 1} is not finite"
    )
    return Diverged(
        f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}. Found in:\n  {culprits}\n"
        f"Nothing was saved after it; the last good checkpoint is {last_good or 'none yet'}. "
        f"Lower training.learning_rate or look at these samples, then "
        f"{'--resume_from latest' if last_good else 'start again with --fresh'}."
    )


def checkpoint_to_restore(row: dict, folder: RunFolder, world: World, recorder: SilentRecorder) -> Path | None:
    """The checkpoint that a run goes back to from the step of `row`; None when there is none and the run goes on.

    A collective. Broken weights may show only in the step after their save: the checkpoint of the step before a row
    that is not finite is passed over. Raises Diverged when there is none and the row is not finite.
    """

    def newest() -> tuple[Path | None, list[str]]:
        if not is_finite(row):
            folder.suspect(row["step"])
        return newest_good(folder.path, folder.suspects())

    found, passed_over = world.from_main(newest)
    for line in passed_over:
        recorder.warn(line)
    if found is None and not is_finite(row):
        recorder.last_row(row)
        raise diverged_too_early(row)
    if found is None:
        recorder.line(f"step {row['step']}: a spike, and no checkpoint yet to roll back to: going on")
    return found


def diverged_too_early(row: dict) -> Diverged:
    """The error of a step that is to be rolled back before anything was saved."""
    return Diverged(
        f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, and no checkpoint yet to roll back "
        f"to; lower training.learning_rate or training.save_interval"
    )
