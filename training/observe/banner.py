"""What a run prints before its first step and when it ends, one screen each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsa.model import count_params
from gsa.units import size_text
from training.config.run_spec import RunSpec
from training.observe.console import format_seconds
from training.planning.cost_model import memory_bytes, setting_of, step_time
from training.planning.devices import find_device

Entry = tuple[str, str]


def start_banner(spec: RunSpec, data: str, folder: Path, device: dict, *, backend: str, tracking: str) -> list[Entry]:
    """data: a line about the training text. device: the "device" event of training/observe/telemetry.py. tracking:
    where the run is tracked."""
    cfg, plan, zero = spec.cfg, spec.plan, spec.ds_config["zero_optimization"]
    t, c = cfg.training, cfg.model
    attention = f"{c.k_base} keys of {t.max_seq_len} ({c.adaptive_k})" if c.sparse else "dense"
    model = f"{count_params(c)['total']:,} parameters, {c.n_layers} layers of {c.d_model}; attention: {attention}"
    batch = (
        f"{plan.global_batch_size} windows = {plan.world_size} ranks x {plan.micro_batch_size} x "
        f"{plan.accumulation_steps} accumulation; {plan.global_batch_size * t.max_seq_len:,} tokens per step, "
        f"{t.max_steps:,} steps"
    )
    offload = ", offload" if "offload_optimizer" in zero else ""
    hardware = (
        f"{device['world_size']} x {device['name']}, {device['memory_gib']:.0f} GiB, "
        f"{device['peak_tflops']:.3g} TFLOP/s ({device['peak_source']}); kernels: {backend}"
    )
    return [
        ("model", model),
        ("data", data),
        ("batch", batch),
        ("zero", f"stage {zero.get('stage', 0)}{offload}, {t.precision}; recomputed: {t.recomputed}"),
        ("device", hardware),
        ("predicted", _predicted(spec, device["name"], backend)),
        ("folder", f"{folder}: metrics.jsonl, step_N/ every {t.save_interval or 'stop'} steps; {tracking}"),
    ]


def _predicted(spec: RunSpec, device_name: str, backend: str) -> str:
    cfg = spec.cfg
    setting = setting_of(cfg, spec.ds_config, spec.plan)
    T, rows = cfg.training.max_seq_len, cfg.training.indexer_loss_rows
    known = find_device(device_name)
    bf16 = cfg.training.precision == "bf16"
    counted = memory_bytes(cfg.model, T, setting, bf16=bf16, rows=rows, fused=device_name != "CPU")
    memory = f"{size_text(counted['allocated'])} per rank"
    if known is None:
        return f"{memory}; no prediction of seconds: this device is in no table"
    if backend != "triton":
        return f"{memory}; no prediction of seconds for kernels other than Triton's"
    time = step_time(cfg.model, T, setting, known, bf16=bf16, rows=rows)
    if time is None:
        return f"{memory}; no prediction of seconds: the peak of {known.name} at {cfg.training.precision} is unknown"
    return f"{memory}, {time.seconds:.2f} s per step: {format_seconds(time.seconds * cfg.training.max_steps)} in all"


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
