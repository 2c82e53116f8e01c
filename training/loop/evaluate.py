"""Held-out loss and bits per byte, and completions of fixed prompts: what the sparse model can do, on all ranks.

Scores are deterministic: the windows are divided over ranks, and the mean is weighted by tokens, exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from training.config.run_spec import RunSpec
from training.data.dataset import Batch, PackedTokens
from training.engine.engine import Engine
from training.engine.world import World
from training.loop.completions import complete


@dataclass(frozen=True)
class Score:
    """loss: nats per target token. bpb: bits per UTF-8 byte of the targets; an end-of-document token has no bytes."""

    loss: float
    bpb: float
    tokens: int


class Evaluator:
    """Evaluates the engine's model on the held-out text. Every rank must call each method at the same step.

    beat: called now and then, as a sign of life.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        data: PackedTokens,
        held_out: PackedTokens,
        world: World,
        beat: Callable[[], None],
    ) -> None:
        self._engine, self._spec, self._data, self._held_out = engine, spec, data, held_out
        self._world, self._beat = world, beat
        self._unigram_bpb: float | None = None

    def evaluate(self, step: int) -> tuple[dict, str]:
        """The "eval" event and a line for the console.

        The sparse model is scored, since that is what will be used; in the dense stage the dense one as well.
        """
        began = time.perf_counter()
        cfg, stage = self._spec.cfg.training, self._engine.module.stage
        row: dict = {"event": "eval", "step": step}
        for scored, suffix in [("sparse", "")] + ([("dense", "_dense")] if stage == "dense" else []):
            with self._stage(scored):
                score = evaluate(
                    self._engine,
                    self._held_out,
                    self._world,
                    n_windows=cfg.eval_windows,
                    micro_batch_size=self._spec.plan.micro_batch_size,
                    beat=self._beat,
                )
            row |= {f"eval_loss{suffix}": score.loss, f"eval_bpb{suffix}": score.bpb, "eval_tokens": score.tokens}
        if self._unigram_bpb is None:  # on all ranks: none waits for another, and their signs of life stay even
            self._unigram_bpb = unigram_score(self._held_out, n_windows=cfg.eval_windows, beat=self._beat).bpb
        row |= {"unigram_bpb": self._unigram_bpb, "eval_seconds": time.perf_counter() - began}
        dense = f", dense {row['eval_bpb_dense']:.4f}" if "eval_bpb_dense" in row else ""
        return row, (
            f"step {step}: held-out {row['eval_bpb']:.4f} bits per byte{dense} (unigram {self._unigram_bpb:.4f}), "
            f"loss {row['eval_loss']:.4f}, {row['eval_seconds']:.1f} s"
        )

    def complete_prompts(self, step: int) -> Iterator[tuple[dict, str]]:
        """For each of training.sample_prompts the "sample" event and a line for the console."""
        cfg = self._spec.cfg.training
        with self._stage("sparse"):
            found = complete(self._engine, self._data, cfg.sample_prompts, cfg.sample_tokens, self._beat)
        for prompt, text in found:
            event = {"event": "sample", "step": step, "prompt": prompt, "text": text}
            yield event, f"step {step}: {prompt!r} -> {text!r}"

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        before = self._engine.module.stage
        self._engine.module.set_stage(stage)
        try:
            yield
        finally:
            self._engine.module.set_stage(before)


def evaluate(
    engine: Engine,
    data: PackedTokens,
    world: World,
    *,
    n_windows: int,
    micro_batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """Scores the first n_windows windows of the held-out order (0: all) with the stage that the model is in.

    Every rank must call it; every rank gets the same score, up to the order of a float64 sum over ranks.
    The model is left in the mode (training or evaluation) in which it was found.
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
            batch = data.batch(ids) if len(ids) else _without_targets(data.batch(np.zeros(1, np.int64)))
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


def _without_targets(batch: Batch) -> Batch:
    return Batch(batch.tokens, torch.full_like(batch.targets, -100), batch.doc_start)


def unigram_score(data: PackedTokens, *, n_windows: int, beat: Callable[[], None] = lambda: None) -> Score:
    """The score of the best model without context on the same targets: the training text's token frequencies.

    Add-one smoothed. It is the baseline that a trained model must beat clearly.
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
