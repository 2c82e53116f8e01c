"""Memory that a forward pass saves for its backward pass, on a CPU: counted, and as training/planning predicts it.

    python -m benchmarks.memory

Counted: the bytes of every tensor that autograd saves (a hook receives each of them), that a checkpointed part holds,
and that gsa/kernels/recompute_cache.py saves; each storage is counted once, parameters and inputs are not. Then memory
and time of activation checkpointing, whose scopes take turns. Writes benchmarks/results/memory_cpu.md; exit code 1 when
a prediction is off by 10 % or more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks

import gsa.kernels
import gsa.model
from benchmarks.comparing import ratio
from benchmarks.measuring import RESULTS, certificate
from gsa import GSAForCausalLM, ModelConfig
from gsa.model import Recomputed
from training.planning.cost_model import saved_bytes

BASE = ModelConfig(
    d_model=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=2,
    d_ffn=768,
    vocab_size=4096,
    max_position_embeddings=1024,
    d_indexer=32,
    n_indexer_heads=4,
    k_base=128,
    k_min=32,
    k_max=256,
)
MODELS = {
    "base": BASE,
    "dense": replace(BASE, sparse=False),
    "no gates": replace(BASE, value_gate=False, output_gate=False),
    "wide": replace(BASE, d_model=512, n_layers=2, d_ffn=1024, n_heads=8, n_kv_heads=8),
    "adaptive_k off": replace(BASE, adaptive_k="off"),
}
ROWS_SHARE = 0.25


class Counter:
    """Counts the bytes of storages, each once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._kept: dict[int, torch.Tensor] = {}  # keeps storages alive: a freed address could be used again

    def see(self, x: object) -> None:
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self._known:
            self._kept.setdefault(x.untyped_storage().data_ptr(), x)

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())


@contextmanager
def counted(known: list[torch.Tensor], recomputed: Recomputed) -> Iterator[Counter]:
    """Counts what code inside this context saves for its backward pass."""
    counter = Counter(known)
    checkpoint, reuse = gsa.model.checkpoint, gsa.kernels.reuse_when_recomputing

    def seen_checkpoint(function, *args, **options):
        # a checkpointed part holds its arguments; storages shared with other parts are counted once
        for x in args:
            counter.see(x)
        return checkpoint(function, *args, **options)

    def seen_reuse(compute):
        results = reuse(compute)
        for x in results:
            counter.see(x)
        return results

    def pack(x: torch.Tensor) -> torch.Tensor:
        counter.see(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x), patch.object(gsa.model, "checkpoint", seen_checkpoint):
        if recomputed == "block":
            with patch.object(gsa.kernels, "reuse_when_recomputing", seen_reuse):
                yield counter
        else:
            yield counter


def case(config: ModelConfig, B: int, T: int, dtype: torch.dtype, recomputed: Recomputed):
    torch.manual_seed(0)
    model = GSAForCausalLM(config).to(dtype)
    model.set_activation_checkpointing(recomputed)
    tokens = torch.randint(0, config.vocab_size, (B, T))
    doc_start = torch.where(torch.arange(T) < T // 3, 0, T // 3).expand(B, T).contiguous()
    rows = torch.randperm(T)[: round(T * ROWS_SHARE)].sort().values

    def forward():
        out = model(tokens, tokens, doc_start, indexer_rows=rows)
        return out.loss + 0.1 * out.indexer_loss

    return forward, [*model.parameters(), tokens, doc_start, rows]


def calibration() -> tuple[list[str], float]:
    lines, worst = [], 0.0
    for name, config in MODELS.items():
        for B, T, dtype in ((2, 512, torch.float32), (2, 512, torch.bfloat16), (1, 1024, torch.bfloat16)):
            for recomputed in ("none", "ffn", "block"):
                forward, known = case(config, B, T, dtype, recomputed)
                with counted(known, recomputed) as counter:
                    forward()
                width = torch.finfo(dtype).bits // 8
                predicted = saved_bytes(config, B, T, width, recomputed=recomputed, rows=ROWS_SHARE, fused=False)[
                    "activations"
                ]
                error = predicted / counter.bytes - 1
                worst = max(worst, abs(error))
                lines.append(
                    f"| {name} | {B} x {T} | {str(dtype).removeprefix('torch.')} | {recomputed} "
                    f"| {predicted / 2**20:.2f} | {counter.bytes / 2**20:.2f} | {error:+.1%} |"
                )
                print(lines[-1], flush=True)
    return lines, worst


def curve(rounds: int = 30) -> list[str]:
    """Rows of memory and time of each scope, relative to none. The scopes take turns, in alternating order."""
    B, T = 4, 512
    config = replace(BASE, n_layers=8)
    forwards, held = {}, {}
    for recomputed in ("none", "ffn", "block"):
        forward, known = case(config, B, T, torch.float32, recomputed)
        with counted(known, recomputed) as counter:
            forward()
        forwards[recomputed], held[recomputed] = forward, counter.bytes
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for number in range(rounds + 1):
        for name, forward in list(forwards.items())[:: 1 if number % 2 else -1]:
            began = time.perf_counter(), time.process_time()
            forward().backward()
            if number:
                spent[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    lines = []
    for name, turns in spent.items():
        ours, none = zip(*turns, strict=True), zip(*spent["none"], strict=True)
        wall, cpu = (str(ratio(a, b)) if name != "none" else "1" for a, b in zip(ours, none, strict=True))
        lines.append(f"| {name} | {held[name] / 2**20:.1f} | {held[name] / held['none']:.2f} | {wall} | {cpu} |")
    return lines


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    lines, worst = calibration()
    text = f"""# Activations: predicted against counted

{certificate("memory", argv)}
Backend chunked; two documents a window; alignment loss on {ROWS_SHARE:.0%} of the rows.

| model | batch | dtype | recomputed | predicted, MiB | counted, MiB | off by |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Worst: {worst:.1%}.

## What activation checkpointing costs

8 layers of the base model, 4 x 512, float32, {torch.get_num_threads()} thread(s), forward and backward. The median of
the ratios of each turn, with its 95 % interval.

| recomputed | held, MiB | of none | wall time, of none | CPU time, of none |
|---|---|---|---|---|
{chr(10).join(curve())}
"""
    (RESULTS / "memory_cpu.md").write_text(text)
    print(f"worst: {worst:.1%}")
    return int(worst >= 0.10)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
