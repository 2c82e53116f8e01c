"""What a run says on one screen before its first step, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsa.model import count_params
from training.config import BatchPlan, RunConfig
from training.data import PackedTokens
from training.observe.console import format_seconds
from training.planning.cost_model import GIB, memory_bytes, setting_of, step_time
from training.planning.devices import find

Entry = tuple[str, str]


def start_banner(
    cfg: RunConfig,
    plan: BatchPlan,
    ds_config: dict,
    data: PackedTokens,
    folder: Path,
    device: dict,
    *,
    backend: str,
    tracking: str,
) -> list[Entry]:
    """device: the "device" event, training/observe/telemetry.py. tracking: where W&B writes, in words."""
    t, c = cfg.training, cfg.model
    tokens = plan.global_batch_size * t.max_seq_len
    zero = ds_config["zero_optimization"]
    attention = f"{c.k_base} keys of {t.max_seq_len} ({c.adaptive_k})" if c.sparse else "dense"
    offload = ", offload" if "offload_optimizer" in zero else ""
    return [
        (
            "model",
            f"{count_params(c)['total']:,} parameters, {c.n_layers} layers of {c.d_model}; attention: {attention}",
        ),
        (
            "data",
            f"{', '.join(map(str, data.sources))}: {data.n_windows:,} windows of {t.max_seq_len} tokens; "
            f"{data.epoch(t.max_steps * plan.global_batch_size):.2f} passes planned",
        ),
        (
            "batch",
            f"{plan.global_batch_size} windows = {plan.world_size} ranks x {plan.micro_batch_size} x "
            f"{plan.accumulation_steps} accumulation; {tokens:,} tokens per step, {t.max_steps:,} steps",
        ),
        ("zero", f"stage {zero.get('stage', 0)}{offload}, {t.precision}; recomputed: {t.recomputed}"),
        (
            "device",
            f"{device['world_size']} x {device['name']}, {device['memory_gib']:.0f} GiB, "
            f"{device['peak_tflops']:.3g} TFLOP/s ({device['peak_source']}); kernels: {backend}",
        ),
        ("predicted", _predicted(cfg, plan, ds_config, device["name"], backend)),
        ("folder", f"{folder}: metrics.jsonl, step_N/ every {t.save_interval or 'stop'} steps; {tracking}"),
    ]


def _predicted(cfg: RunConfig, plan: BatchPlan, ds_config: dict, name: str, backend: str) -> str:
    setting = setting_of(cfg, ds_config, plan)
    T, rows = cfg.training.max_seq_len, cfg.training.indexer_loss_rows
    known = find(name)
    bf16 = cfg.training.precision == "bf16"
    counted = memory_bytes(cfg.model, T, setting, bf16=bf16, rows=rows, fused=name != "CPU")
    size = counted["allocated"] / GIB
    memory = f"{size:.2f} GiB per rank" if size >= 0.1 else f"{size * 1024:.1f} MiB per rank"
    if known is None:
        return f"{memory}; no seconds for a device that is in no table"
    if backend != "triton":
        return f"{memory}; no seconds for kernels other than Triton's"
    time = step_time(cfg.model, T, setting, known, bf16=bf16, rows=rows)
    if time is None:
        return f"{memory}; no seconds: the peak of {known.name} at {cfg.training.precision} is in no table"
    return f"{memory}, {time.seconds:.2f} s per step: {format_seconds(time.seconds * cfg.training.max_steps)} for all"


def closing_summary(
    *,
    reason: str,
    first_step: int,
    rows: Sequence[dict],
    seconds: float,
    evaluated: dict | None,
    checkpoint: str | None,
) -> list[Entry]:
    """rows: the last steps, for medians; evaluated: the last "eval" event; checkpoint: what `latest` names."""
    if not rows:
        return [("ended", f"{reason}, nothing trained"), ("checkpoint", checkpoint or "none")]
    last = rows[-1]
    pace = sorted(row["tokens_per_s"] for row in rows)[len(rows) // 2]
    mfu = sorted(row["mfu"] for row in rows)[len(rows) // 2]
    entries = [
        ("ended", f"{reason} at step {last['step']}, {last['step'] - first_step} steps in {format_seconds(seconds)}"),
        ("loss", f"{last['loss']:.4f} nats per token, epoch {last['epoch']:.3f}, {last['tokens']:,} tokens"),
        ("pace", f"{pace:,.0f} tokens/s, MFU {mfu:.1%} (medians of the last {len(rows)} steps)"),
    ]
    if evaluated is not None:
        entries.append(("held-out", f"{evaluated['eval_bpb']:.4f} bits per byte at step {evaluated['step']}"))
    return [*entries, ("checkpoint", checkpoint or "none")]
