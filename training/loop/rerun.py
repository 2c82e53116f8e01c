"""Runs the batch of one step again, window by window, on one device without an engine, in float32.

A step can have been trained more than once, before a crash or a rollback: metrics.jsonl has its row on the run's one
curve, and segments/metrics_K.jsonl those of discarded branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gsa import GSAForCausalLM
from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.generation import load_model
from training.config import BatchPlan, RunConfig, from_plain, load_config, plan_batch
from training.config.exit_codes import Refusal
from training.data.dataset import DataError, PackedTokens
from training.data.loader import step_samples
from training.data.open import open_training_text
from training.record.metrics_log import iter_rows
from training.record.run_folder import RunFolder

WORST_TOKENS = 5
"""Tokens of largest loss that are reported of each window."""


@dataclass(frozen=True)
class TrainedStep:
    """A row of a step, and the configuration and number of ranks of the launch that trained it.

    segment: K when the row is in segments/metrics_K.jsonl, of a discarded branch; None: it is in metrics.jsonl. text:
    the fingerprint of the training text, where the launch recorded it.
    """

    row: dict
    segment: int | None
    cfg: RunConfig
    world_size: int
    text: str | None = None


@dataclass(frozen=True)
class Window:
    """A window of a step, run again.

    sample: its number in the data order. rank: which rank trained on it. place: where its text lies. loss: nats per
    target token, of which there are `targets`. worst: text and loss of the targets with the largest losses.
    """

    sample: int
    rank: int
    place: str
    loss: float
    targets: int
    worst: list[tuple[str, float]]
    text: str


def trainings_of(folder: Path, step: int) -> list[TrainedStep]:
    """All trainings of a step: that of the run's one curve first, then those of discarded branches, newest first.

    Raises Refusal when there is none.
    """
    segments = {int(p.stem.removeprefix("metrics_")): p for p in (folder / "segments").glob("metrics_*.jsonl")}
    files: dict[int | None, Path] = {None: RunFolder(folder).metrics, **dict(sorted(segments.items(), reverse=True))}
    found: list[tuple[int | None, dict]] = []
    launches: list[dict] = []
    for segment, path in files.items():
        for row in iter_rows(path):
            if row.get("event") in ("start", "resume"):
                launches.append(row)
            elif "loss" in row and row.get("step") == step:
                found.append((segment, row))
    if not found:
        raise Refusal(f"{folder} has no step {step} in metrics.jsonl; its rows say which steps there are")
    return [TrainedStep(row, segment, *_launch_of(folder, launches, row)) for segment, row in found]


def _launch_of(folder: Path, launches: list[dict], row: dict) -> tuple[RunConfig, int, str | None]:
    """Configuration, number of ranks and text of the launch that wrote a row; of the newest where it recorded none."""
    before = [launch for launch in launches if launch.get("time", 0) <= row.get("time", 0)]
    launch = max(before, key=lambda launch: launch.get("time", 0), default={})
    cfg = from_plain(launch["config"]) if "config" in launch else load_config(folder / "config.yaml", [])
    ranks = launch.get("world_size") or RunFolder(folder).read_run().get("world_size", 1)
    return cfg, ranks, launch.get("data_fingerprint")


def choose_training(trainings: Sequence[TrainedStep], segment: int | None) -> TrainedStep:
    """The training in `segment`; None: the first. Raises Refusal, with what there is, when there is none."""
    for trained in trainings:
        if segment is None or trained.segment == segment:
            return trained
    there = ", ".join("metrics.jsonl" if t.segment is None else f"segment {t.segment}" for t in trainings)
    raise Refusal(f"step {trainings[0].row['step']} is not in segment {segment}; it is in {there}")


def checkpoint_before(folder: Path, step: int) -> Path:
    """The newest checkpoint of a step before `step`, every byte verified. Raises CheckpointError when there is none."""
    tags = sorted(
        (int(path.name.removeprefix("step_")), path)
        for path in folder.glob("step_*")
        if path.name.removeprefix("step_").isdigit() and (path / manifest.MANIFEST).exists()
    )
    before = [path for number, path in tags if number < step]
    if not before:
        raise CheckpointError(
            f"{folder} has no checkpoint before step {step}; name one with --checkpoint (of another step, or run)"
        )
    manifest.verify(before[-1])
    return before[-1]


def rerun_step(trained: TrainedStep, checkpoint: Path, *, same_data: bool) -> list[Window]:
    """Every window of a step through the weights of a checkpoint, in the attention stage that the step had.

    same_data: refuse a dataset that is not the one that the step was trained on. Raises Refusal when the row lacks a
    field, DataError and CheckpointError when data or checkpoint cannot be read.
    """
    row = trained.row
    if missing := {"samples", "stage", "grad_norm"} - row.keys():
        raise Refusal(f"the row of step {row['step']} has no {', '.join(sorted(missing))}; it cannot be run again")
    data = open_training_text(trained.cfg)
    if same_data and (trained.text or read_run_state(checkpoint).data_fingerprint) != data.fingerprint:
        raise DataError(
            f"the text under {', '.join(data.sources)} is not what step {row['step']} was trained on; restore it"
        )
    tokenizer = data.load_tokenizer()
    model = load_model(checkpoint)
    model.set_stage(row["stage"])
    plan = plan_batch(trained.cfg.training, trained.world_size)
    return [_rerun(model, data, tokenizer, sample, rank) for sample, rank in _samples_of(row, plan)]


def _samples_of(row: dict, plan: BatchPlan) -> list[tuple[int, int]]:
    """(sample, rank) of every window of a step, by sample."""
    first = row["samples"] - plan.global_batch_size
    return sorted(
        (int(sample), rank)
        for rank in range(plan.world_size)
        for numbers in step_samples(first, plan, rank)
        for sample in numbers
    )


@torch.no_grad()
def _rerun(model: GSAForCausalLM, data: PackedTokens, tokenizer: Tokenizer, sample: int, rank: int) -> Window:
    number = np.array([sample])
    batch = data.batch(number)
    logits = model(batch.tokens, doc_start=batch.doc_start).logits[0]
    targets = batch.targets[0]
    valid = targets >= 0
    losses = torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="none")
    largest = losses.topk(min(WORST_TOKENS, len(losses)))
    ids = targets[valid][largest.indices].tolist()
    return Window(
        sample,
        rank,
        place=data.describe(number)[0],
        loss=losses.mean().item(),
        targets=len(losses),
        worst=[(tokenizer.decode([i]), loss) for i, loss in zip(ids, largest.values.tolist(), strict=True)],
        text=tokenizer.decode(batch.tokens[0].tolist(), skip_special_tokens=False),
    )
