"""Held-out loss and bits per byte: deterministic, sharded over ranks, an exact token-weighted mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from training.data import Batch, PackedTokens
from training.engine.engine import Engine
from training.engine.world import World


@dataclass(frozen=True)
class Score:
    """loss: nats per target token. bpb: bits per UTF-8 byte of the targets; an end-of-document token has none."""

    loss: float
    bpb: float
    tokens: int


def evaluate(
    engine: Engine,
    data: PackedTokens,
    world: World,
    *,
    n_windows: int,
    micro_batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """Scores the first n_windows windows of the held-out order (0: all) with the stage the model is in.

    Every rank must call it; every rank gets the same score, up to the order of a float64 sum over ranks.
    The model is left in evaluation mode as it was found. beat: a sign of life, called once per micro-batch.
    """
    total = min(n_windows or data.n_windows, data.n_windows)
    own = np.arange(total)[world.rank :: world.size]
    # under ZeRO 3 a forward pass is a collective: every rank makes the same number of them
    calls = math.ceil(math.ceil(total / world.size) / micro_batch_size)
    byte_counts = torch.from_numpy(data.token_bytes.astype(np.int64))
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    was_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        for call in range(calls):
            beat()
            ids = own[call * micro_batch_size : (call + 1) * micro_batch_size]
            batch = data.batch(ids) if len(ids) else _nothing(data.batch(np.zeros(1, np.int64)))
            moved = batch.to(world.device)
            nats = engine.forward(moved.tokens, moved.targets, moved.doc_start, n_targets=1.0).loss
            valid = batch.targets[batch.targets >= 0]
            sums += torch.tensor([float(nats), valid.numel(), int(byte_counts[valid].sum())], dtype=torch.float64)
    if was_training:
        engine.train()
    sums = sums.to(world.device)
    dist.all_reduce(sums)
    nats, tokens, n_bytes = sums.tolist()
    return Score(loss=nats / tokens, bpb=nats / math.log(2) / n_bytes, tokens=int(tokens))


def _nothing(batch: Batch) -> Batch:
    return Batch(batch.tokens, torch.full_like(batch.targets, -100), batch.doc_start)


def unigram_score(data: PackedTokens, *, n_windows: int, beat: Callable[[], None] = lambda: None) -> Score:
    """What the best model without context reaches on the same targets: the training text's token frequencies.

    Add-one smoothed. The baseline that a trained model must beat clearly.
    """
    counts = sum(np.load(Path(source) / "token_counts.npy").astype(np.float64) for source in data.sources)
    nats_of = -np.log((counts + 1) / (counts + 1).sum())
    nats = tokens = n_bytes = 0.0
    total = min(n_windows or data.n_windows, data.n_windows)
    for first in range(0, total, 64):
        beat()
        targets = data.batch(np.arange(first, min(first + 64, total))).targets.numpy()
        valid = targets[targets >= 0]
        nats += nats_of[valid].sum()
        tokens += valid.size
        n_bytes += data.token_bytes[valid].astype(np.int64).sum()
    return Score(loss=nats / tokens, bpb=nats / math.log(2) / n_bytes, tokens=int(tokens))
