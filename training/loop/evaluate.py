"""Held-out loss and bits per byte, and completions of fixed prompts: what the sparse model can do, on all ranks.

Scores are deterministic: the windows are divided over ranks, and the mean is weighted by tokens, exactly.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    @classmethod
    def of(cls, nats: float, tokens: float, n_bytes: float) -> Score:
        """The score of targets with `nats` in all, that are `tokens` tokens and `n_bytes` bytes."""
        return cls(loss=nats / tokens, bpb=nats / math.log(2) / n_bytes, tokens=int(tokens))


class Interrupted(Exception):
    """A stop request came, and the evaluation was broken off on all ranks."""


class EvaluationError(RuntimeError):
    """The evaluation failed on some rank. It is raised on all of them, none of which waits for another."""


class Evaluator:
    """Evaluates the engine's model on the held-out text. Every rank must call each method at the same step.

    interrupted: whether a rank has been asked to stop, the same on all ranks; a collective, called before each batch.
    beat: called now and then, as a sign of life.

    The methods raise Interrupted, and EvaluationError on all ranks when one of them fails. Under ZeRO 3 a rank that
    fails alone raises its own error instead: a forward pass is a collective, and the others are waiting in one.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        data: PackedTokens,
        held_out: PackedTokens,
        world: World,
        interrupted: Callable[[], bool],
        beat: Callable[[], None],
    ) -> None:
        self._engine, self._spec, self._data, self._held_out = engine, spec, data, held_out
        self._world, self._interrupted, self._beat = world, interrupted, beat
        self._unigram_bpb: float | None = None
        self.evaluated_at = self.sampled_at = -1
        """Steps after which the rows of the run have an evaluation, and completions, already."""

    def due(self, step: int) -> list[Callable[[int], list[tuple[dict, str]]]]:
        """What is to be done after `step`, and has not been done: `evaluate`, `complete_prompts`."""
        cfg, due = self._spec.cfg.training, []
        if (is_due(cfg.eval_interval, step) or step == self._spec.last_step) and self.evaluated_at != step:
            due.append(self.evaluate)
        if is_due(cfg.sample_interval, step) and self.sampled_at != step:
            due.append(self.complete_prompts)
        return due

    def evaluate(self, step: int) -> list[tuple[dict, str]]:
        """The "eval" event and a line for the console.

        The sparse model is scored, since that is what will be used; in the dense stage the dense one as well.
        """
        began = time.perf_counter()
        stage = self._engine.module.stage
        row: dict = {"event": "eval", "step": step}
        for scored, suffix in [("sparse", "")] + ([("dense", "_dense")] if stage == "dense" else []):
            with self._stage(scored):
                score = self._score()
            row |= {f"eval_loss{suffix}": score.loss, f"eval_bpb{suffix}": score.bpb, "eval_tokens": score.tokens}
        if self._unigram_bpb is None:
            self._unigram_bpb = self._unigram_score().bpb
        row |= {"unigram_bpb": self._unigram_bpb, "eval_seconds": time.perf_counter() - began}
        dense = f", dense {row['eval_bpb_dense']:.4f}" if "eval_bpb_dense" in row else ""
        line = (
            f"step {step}: held-out {row['eval_bpb']:.4f} bits per byte{dense} (unigram {self._unigram_bpb:.4f}), "
            f"loss {row['eval_loss']:.4f}, {row['eval_seconds']:.1f} s"
        )
        return [(row, line)]

    def complete_prompts(self, step: int) -> list[tuple[dict, str]]:
        """For each of training.sample_prompts the "sample" event and a line for the console."""
        cfg, found = self._spec.cfg.training, []

        def complete_one(number: int) -> None:
            prompt = cfg.sample_prompts[number]
            with self._stage("sparse"):
                text = complete(self._engine, self._data, prompt, cfg.sample_tokens)
            event = {"event": "sample", "step": step, "prompt": prompt, "text": text}
            found.append((event, f"step {step}: {prompt!r} -> {text!r}"))

        self._rounds(len(cfg.sample_prompts), complete_one)
        return found

    def _rounds(self, count: int, work: Callable[[int], None], *, collective: bool = True) -> None:
        """Calls work(0), ..., work(count - 1) on every rank, and asks before each whether to stop.

        A rank whose work fails does no more of it, but takes part until the end; then EvaluationError is raised on all
        ranks. collective: the work runs the model, which under ZeRO 3 all ranks must do together.
        """
        failed = None
        for number in range(count):
            self._beat()
            if self._interrupted():
                raise Interrupted
            try:
                if failed is None:
                    work(number)
            except Exception as err:
                if collective and self._engine.zero_stage == 3 and self._world.size > 1:
                    raise
                failed = err
        texts = self._world.gather(None if failed is None else f"{type(failed).__name__}: {failed}")
        for rank, text in enumerate(texts):
            if text is not None:
                raise EvaluationError(f"the evaluation failed on rank {rank}: {text}") from failed

    def _score(self) -> Score:
        """The score of the first training.eval_windows distinct windows of the held-out order, in the present stage.

        Every rank gets the same score, up to the order of a float64 sum over ranks. The model is left in the mode
        (training or evaluation) in which it was found.
        """
        engine, data, world = self._engine, self._held_out, self._world
        micro_batch_size = self._spec.plan.micro_batch_size
        own = self._windows[world.rank :: world.size]
        # under ZeRO 3 a forward pass is a collective: every rank makes the same number of them
        calls = math.ceil(math.ceil(len(self._windows) / world.size) / micro_batch_size)
        byte_counts = torch.from_numpy(data.token_bytes.astype(np.int64))
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes

        def score_one(call: int) -> None:
            ids = own[call * micro_batch_size : (call + 1) * micro_batch_size]
            batch = data.batch(ids) if len(ids) else _without_targets(data.batch(np.zeros(1, np.int64)))
            moved = batch.to(world.device)
            with torch.no_grad():
                nats = engine.forward(moved.tokens, moved.targets, moved.doc_start, n_targets=1.0).loss
            valid = batch.targets[batch.targets >= 0]
            sums.add_(torch.tensor([float(nats), valid.numel(), int(byte_counts[valid].sum())], dtype=torch.float64))

        with evaluating(engine):
            self._rounds(calls, score_one)
        sums = sums.to(world.device)
        dist.all_reduce(sums)
        return Score.of(*sums.tolist())

    def _unigram_score(self) -> Score:
        """The score of the best model without context on the same targets: the training text's token frequencies.

        Add-one smoothed. It is the baseline that a trained model must beat clearly. Every rank computes it: none waits
        for another, and their signs of life stay even.
        """
        data, sums = self._held_out, np.zeros(3)
        nats_of: list[np.ndarray] = []

        def score_one(number: int) -> None:
            if not nats_of:
                counts = data.token_counts.astype(np.float64)
                nats_of.append(-np.log((counts + 1) / (counts + 1).sum()))
            targets = data.batch(self._windows[number * 64 : (number + 1) * 64]).targets.numpy()
            valid = targets[targets >= 0]
            sums[:] += nats_of[0][valid].sum(), valid.size, data.token_bytes[valid].astype(np.int64).sum()

        self._rounds(math.ceil(len(self._windows) / 64), score_one, collective=False)
        return Score.of(*sums.tolist())

    @functools.cached_property
    def _windows(self) -> np.ndarray:
        """The sample numbers that are scored, each of another window."""
        return self._held_out.distinct(self._spec.cfg.training.eval_windows)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        before = self._engine.module.stage
        self._engine.module.set_stage(stage)
        try:
            yield
        finally:
            self._engine.module.set_stage(before)


def is_due(interval: int, step: int) -> bool:
    """Whether `step` is one of every `interval`; never when interval is 0."""
    return bool(interval) and step % interval == 0


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode in which it was found."""
    was_training = engine.module.training
    engine.eval()
    try:
        yield
    finally:
        if was_training:
            engine.train()


def _without_targets(batch: Batch) -> Batch:
    return Batch(batch.tokens, torch.full_like(batch.targets, -100), batch.doc_start)
