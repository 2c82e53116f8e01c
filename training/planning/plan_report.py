"""What `python -m training.plan` prints and writes: a page for people, JSON for programs, and the recommended run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gsa.files import write_atomically
from gsa.model import count_params, flops_per_token
from gsa.units import GIB, size_text
from training.config import ConfigError, to_yaml
from training.planning.cost_model import ASSUMED, checkpoint_bytes
from training.planning.devices import Device
from training.planning.options import Option, Request, attention_comparison, why_not, zero_kind

SHOWN = 8
"""Options that the page lists from the top of the ranking; the JSON has all of them."""


def as_json(request: Request, given: Option, options: Sequence[Option]) -> dict:
    """All numbers of a plan. options: from `ranked`, the recommended one first."""
    cfg, best = request.cfg, options[0]
    T = cfg.training.max_seq_len
    tokens = given.setting.global_batch_size * T
    return {
        "parameters": count_params(cfg.model)["total"],
        "parameters_by_part": {k: v for k, v in count_params(cfg.model).items() if k != "total"},
        "gpu": asdict(request.device),
        "fits": best.fits(request.device),
        "gpus": given.setting.world_size,
        "tokens_per_step": tokens,
        **_figures(given, tokens),
        "memory_gib": {name: size / GIB for name, size in given.memory.items()},
        "seconds_by_part": given.time.parts,
        "communication_seconds": given.time.communication,
        "communication_exposed_seconds": given.time.exposed,
        "flops_per_token": flops_per_token(cfg.model, T, indexer_rows=cfg.training.indexer_loss_rows),
        "days": cfg.training.max_steps * given.time.seconds / 86400,
        "checkpoint_gib": checkpoint_bytes(cfg, None) / GIB,
        "assumed": asdict(ASSUMED),
        "recommended": _figures(best, tokens),
        "alternatives": [_figures(o, tokens) | {"why": why_not(o, best, request.device)} for o in options],
    }


def _figures(o: Option, tokens: int) -> dict:
    s = o.setting
    return {
        "zero_stage": s.zero_stage,
        "offload": s.offload,
        "micro_batch_size": s.micro_batch_size,
        "accumulation_steps": s.accumulation_steps,
        "recomputed": s.recomputed,
        "peak_gib_per_gpu": o.peak_gib,
        "seconds_per_step": o.time.seconds,
        "mfu": o.time.mfu,
        "tokens_per_s": tokens / o.time.seconds,
    }


def report(request: Request, given: Option, options: Sequence[Option]) -> str:
    """The plan as a page of text. options: from `ranked`, the recommended one first."""
    cfg, device = request.cfg, request.device
    c, s, t, T = cfg.model, given.setting, given.time, cfg.training.max_seq_len
    precision = cfg.training.precision
    tflops = device.bf16_tflops if precision == "bf16" else device.fp32_tflops
    n = count_params(c)
    tokens = s.global_batch_size * T
    flops = flops_per_token(c, T, indexer_rows=cfg.training.indexer_loss_rows)
    bandwidth = f"{device.memory_gb_s:,.0f} GB/s" if device.memory_gb_s else "unknown bandwidth (not counted)"
    nothing = [] if options[0].fits(device) else [f"Nothing fits {nothing_fits(options[0], device)}", ""]
    lines = [
        *nothing,
        f"{request.config_path.name} on {s.world_size} x {device.name}: {device.memory_gib:g} GiB, {tflops:g} TFLOP/s "
        f"{precision}, memory {bandwidth}, {device.link_gb_s:g} GB/s between GPUs",
        "",
        f"Parameters  {n['total']:,}: " + ", ".join(f"{k} {v:,}" for k, v in n.items() if k != "total" and v),
        f"Batch       {s.global_batch_size} windows of {T:,} tokens = {s.world_size} GPUs x {s.micro_batch_size} x "
        f"{s.accumulation_steps} accumulation steps; {tokens:,} tokens per step",
        f"Arithmetic  {flops['total'] / 1e9:.2f} useful GFLOP per token: "
        + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in flops.items() if k != "total" and v),
        "",
        f"Memory in GiB per GPU with {request.file.name}, micro-batch {s.micro_batch_size}, recomputed: {s.recomputed}",
        *(
            f"  {part:<24}{size / GIB:8.2f}"
            for part, size in given.memory.items()
            if part not in ("peak", "allocated") and size
        ),
        f"  {'peak':<24}{given.peak_gib:8.2f}   of {device.memory_gib:g}"
        + ("" if given.fits(device) else "   DOES NOT FIT"),
        "  (the peak is not the sum: the backward pass and the optimizer step hold different parts)",
        "",
        f"Step        {t.seconds:.2f} s predicted, {tokens / t.seconds:,.0f} tokens/s, MFU {t.mfu:.1%}",
        "            " + ", ".join(f"{part} {spent:.2f}" for part, spent in t.parts.items() if spent >= 0.005),
        f"            communication {t.communication:.2f} s, of which computation does not hide {t.exposed:.2f} s",
        f"Whole run   {cfg.training.max_steps:,} steps: {cfg.training.max_steps * t.seconds / 86400:.1f} days",
        f"Checkpoint  {size_text(checkpoint_bytes(cfg, None))} each",
        "",
        f"Ways to run {s.global_batch_size} windows per step, the best first:",
        "  ZeRO       micro  accum.  recomputed  peak GiB  s/step    MFU",
        *(_line(o, options[0], device) for o in _shown(options, given)),
        "",
        "Attention:",
        *(f"  {line}" for line in attention_comparison(c, device, cfg.training.indexer_loss_rows)),
        "",
        "Seconds are predicted, not measured: counted work divided by assumed shares of the peaks ("
        + ", ".join(f"{k} {v:g}" for k, v in asdict(ASSUMED).items())
        + "). Measure with python -m training.tune.",
    ]
    return "\n".join(lines)


def nothing_fits(best: Option, device: Device) -> str:
    """What the setting with the least memory would need, and what to change. best: that setting."""
    return (
        f"{best.setting.world_size} x {device.name}: the setting with the least memory takes "
        f"{size_text(best.peak_gib * GIB)}, offloading included; use more GPUs or a smaller model"
    )


def _shown(options: Sequence[Option], given: Option) -> list[Option]:
    """The best options, the given one, and the last one, which is the slowest or the furthest from fitting."""
    return [o for i, o in enumerate(options) if i < SHOWN or o.setting == given.setting or o is options[-1]]


def _line(o: Option, best: Option, device: Device) -> str:
    s = o.setting
    kind = f"{s.zero_stage} offload" if s.offload else f"{s.zero_stage}"
    return (
        f"  {kind:<9}  {s.micro_batch_size:>5}  {s.accumulation_steps:>6}  {s.recomputed:<10}  {o.peak_gib:>8.1f}  "
        f"{o.time.seconds:>6.2f}  {o.time.mfu:>5.1%}  {why_not(o, best, device)}"
    )


def write_run(request: Request, best: Option, folder: Path) -> tuple[Path, Path]:
    """Writes the recommended run to `folder` as plan.yaml and plan_ds_config.json; returns their paths.

    ConfigError when nothing fits, when one of the files exists already, or when the folder cannot be written.
    """
    cfg, s, device = request.cfg, best.setting, request.device
    if not best.fits(device):
        raise ConfigError(f"nothing fits {nothing_fits(best, device)}")
    yaml_path, json_path = folder / "plan.yaml", folder / "plan_ds_config.json"
    for path in (yaml_path, json_path):
        if path.exists():
            raise ConfigError(f"--write: {path} exists already; give another folder, or remove it")
    training = replace(
        cfg.training,
        micro_batch_size=s.micro_batch_size,
        gradient_accumulation_steps=None,  # it follows from global_batch_size, on any number of ranks
        global_batch_size=s.global_batch_size,
        gradient_checkpointing=s.recomputed != "none",
        checkpointing_scope="block" if s.recomputed == "none" else s.recomputed,
    )
    ds_config = request.files()[zero_kind(s)].read_text()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(json_path, ds_config)
        _write(
            yaml_path,
            f"# Recommended by training.plan for {s.world_size} x {device.name}: "
            f"{size_text(best.peak_gib * GIB)} per GPU and {best.time.seconds:.2f} s per step, predicted.\n"
            + to_yaml(replace(cfg, training=training)),
        )
    except OSError as err:
        raise ConfigError(f"--write {folder}: {err.strerror or err}") from err
    return yaml_path, json_path


def _write(path: Path, text: str) -> None:
    with write_atomically(path, durable=False) as file:
        file.write(text.encode())
