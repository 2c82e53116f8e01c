"""What a run will need and take, before a GPU is rented: `python -m training.plan --config X --gpus 4 --gpu L40S`.

Counts parameters, memory by part and arithmetic, predicts seconds per step, and ranks the ways to run the same global
batch: ZeRO stage, micro-batch, activation checkpointing. Needs no GPU. Memory is counted (benchmarks/memory.py checks
the count); seconds rest on shares of the device's peak that are assumed, and printed with them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gsa.config import ModelConfig
from gsa.model import count_params, flops_per_token
from training.config import BatchPlan, ConfigError, RunConfig, load_config, plan_batch, to_yaml
from training.config.deepspeed import DEFAULT, resolve_ds_config
from training.planning import cost_model as cost
from training.planning.cost_model import GIB, Setting, StepTime, setting_of
from training.planning.devices import Device, parse
from training.planning.space import checkpoint_bytes

USABLE = 0.90
"""Of a device's memory: what is left is for what no count knows, as other processes' contexts."""
TIE = 0.02
"""Times closer than this are one to the model."""
SHOWN = 8
LARGEST_MICRO_BATCH = 64
DS_CONFIGS = DEFAULT.parent
SLOW_LINK_GB_S = 100.0
"""Below it GPUs talk over PCIe, above over NVLink."""


@dataclass(frozen=True)
class Option:
    """One setting with what it is predicted to take. peak_gib: per GPU."""

    setting: Setting
    memory: dict[str, float]
    time: StepTime

    @property
    def peak_gib(self) -> float:
        return self.memory["peak"] / GIB

    def fits(self, device: Device) -> bool:
        return self.peak_gib <= USABLE * device.memory_gib


@dataclass(frozen=True)
class Request:
    """What is asked: a configuration on `batch.world_size` devices, with DeepSpeed's settings in `file`."""

    cfg: RunConfig
    config_path: Path
    batch: BatchPlan
    device: Device
    file: Path

    def setting(self, file: Path) -> Setting:
        """The configuration's own with another file. ConfigError where the two do not go together."""
        return setting_of(self.cfg, resolve_ds_config(file, self.cfg, self.batch, self.config_path), self.batch)

    def option(self, s: Setting) -> Option:
        """ConfigError where the device's peak at the precision is not known."""
        cfg, T, rows = self.cfg, self.cfg.training.max_seq_len, self.cfg.training.indexer_loss_rows
        bf16 = cfg.training.precision == "bf16"
        time = cost.step_time(cfg.model, T, s, self.device, bf16=bf16, rows=rows)
        if time is None:
            raise ConfigError(
                f"the peak of {self.device.name} at training.precision={cfg.training.precision} is not known; give "
                f"--gpu as <GiB>,<TFLOPs>,<GB/s to other GPUs>,<GB/s of its memory>"
            )
        return Option(s, cost.memory_bytes(cfg.model, T, s, bf16=bf16, rows=rows), time)

    def files(self) -> dict[Kind, Path]:
        """DeepSpeed's settings by kind: those of ds_configs/ that go with the configuration, or the file given."""
        kinds = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
        if self.batch.world_size == 1 and self.cfg.training.precision == "fp32":  # there is nothing to shard
            kinds = [(0, False), (2, True), (3, True)]
        found = {}
        for kind in kinds:
            file = DS_CONFIGS / ds_config_for(*kind, self.batch.world_size, self.device)
            with suppress(ConfigError):
                self.setting(file)
                found[kind] = file
        return found | {kind_of(self.setting(self.file)): self.file}


Kind = tuple[int, bool]
"""A ZeRO stage, and whether the optimizer is offloaded."""


def kind_of(s: Setting) -> Kind:
    return s.zero_stage, s.offload


def ds_config_for(stage: int, offload: bool, world_size: int, device: Device) -> str:
    """Which file of ds_configs/ serves a kind of setting on this device."""
    if stage == 2 and world_size > 1 and not offload:
        return "zero2_pcie.json" if device.link_gb_s < SLOW_LINK_GB_S else "zero2_nvlink.json"
    return f"zero{stage}{'_offload' * offload}.json"


def alternatives(request: Request) -> Iterator[Setting]:
    """Every ZeRO stage, micro-batch and scope of recomputation at the given global batch."""
    per_rank = request.batch.micro_batch_size * request.batch.accumulation_steps
    for file in request.files().values():
        base = request.setting(file)
        for micro in range(1, min(per_rank, LARGEST_MICRO_BATCH) + 1):
            if per_rank % micro:
                continue
            for recomputed in ("none", "ffn", "block"):
                yield replace(base, micro_batch_size=micro, accumulation_steps=per_rank // micro, recomputed=recomputed)


def ranked(request: Request) -> list[Option]:
    """What fits, fastest first, then what does not.

    As fast is what loses less than TIE; there the given setting comes first, as nothing is gained by leaving it, then
    the lower ZeRO stage, then less memory. Offloading takes part where it was asked for, or nothing fits without.
    """
    device, given = request.device, request.setting(request.file)
    settings = list(alternatives(request))
    found = [request.option(s) for s in (settings if given in settings else [*settings, given])]
    if not given.offload and any(o.fits(device) for o in found if not o.setting.offload):
        found = [o for o in found if not o.setting.offload]
    fastest = min((o.time.seconds for o in found if o.fits(device)), default=1.0)

    def order(o: Option) -> tuple[bool, int, bool, int, float]:
        if not o.fits(device):
            return True, 0, False, 0, o.peak_gib
        behind = int((o.time.seconds / fastest - 1) / TIE)
        return False, behind, o.setting != given, o.setting.zero_stage, o.peak_gib

    return sorted(found, key=order)


def why_not(o: Option, best: Option, device: Device) -> str:
    """Why `o` is not the recommended one."""
    if not o.fits(device):
        return f"does not fit: {o.peak_gib:.1f} GiB of {USABLE * device.memory_gib:.1f} usable"
    if o is best:
        return "recommended"
    if o.time.seconds <= best.time.seconds * (1 + TIE):
        if o.time.communication > 1.01 * best.time.communication:
            return f"as fast; {o.peak_gib - best.peak_gib:+.1f} GiB, and more to communicate"
        return f"as fast; {o.peak_gib - best.peak_gib:+.1f} GiB"
    computed = ("matrix products", "attention", "elementwise")
    products = sum(o.time.parts[name] - best.time.parts[name] for name in computed)
    losses = {
        "communication that nothing hides": o.time.exposed - best.time.exposed,
        "the optimizer on the host": o.time.parts["optimizer"] - best.time.parts["optimizer"],
        "waiting for launches": o.time.parts["waiting for launches"] - best.time.parts["waiting for launches"],
        "recomputation" if o.setting.recomputed != best.setting.recomputed else "smaller matrix products": products,
    }
    worst = max(losses, key=losses.get)
    return f"{o.time.seconds / best.time.seconds - 1:+.0%}: {worst} ({losses[worst]:+.2f} s)"


# -- GSA beside dense attention -------------------------------------------------------------------------


def attention_comparison(c: ModelConfig, device: Device, rows: float) -> list[str]:
    """Where GSA costs more than dense attention, and from which length it wins."""
    if not c.sparse:
        return ["This model has dense attention (model.sparse=false)."]
    dense = replace(c, sparse=False)
    peak = device.bf16_tflops * 1e12  # of either precision: it is the same on both sides
    lines = ["length   useful FLOPs of attention, to dense   predicted seconds, to dense"]
    for T in (1024, 2048, 4096, 8192, 32768, 131072):
        flops = _attention_flops(c, T, rows) / _attention_flops(dense, T, rows)
        seconds = cost.attention_seconds(c, T, peak, sparse=True) + cost.indexer_seconds(c, T, peak, rows)
        lines.append(
            f"{T:>7,}  {flops:>36.2f}   {seconds / cost.attention_seconds(dense, T, peak, sparse=False):>27.2f}"
        )
    wins = next(
        (T for T in range(256, 2**20, 256) if _attention_flops(c, T, rows) < _attention_flops(dense, T, rows)), None
    )
    lines.append(
        f"By arithmetic GSA is cheaper from {wins:,} tokens on." if wins else "By arithmetic GSA is never cheaper."
    )
    lines.append(
        "By time, today's kernels visit every visible key and mask what is not selected: GSA costs more than dense "
        "attention at every length, and buys quality of selection, not speed."
    )
    return lines


def _attention_flops(c: ModelConfig, T: int, rows: float) -> float:
    parts = flops_per_token(c, T, indexer_rows=rows)
    return parts["attention"] + parts["indexer"]


# -- telling --------------------------------------------------------------------------------------------


def as_json(cfg: RunConfig, given: Option, best: Option, others: list[Option], device: Device) -> dict:
    T = cfg.training.max_seq_len
    tokens = given.setting.global_batch_size * T
    return {
        "parameters": count_params(cfg.model)["total"],
        "parameters_by_part": {k: v for k, v in count_params(cfg.model).items() if k != "total"},
        "gpu": asdict(device),
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
        "assumed": asdict(cost.ASSUMED),
        "recommended": _figures(best, tokens),
        "alternatives": [_figures(o, tokens) | {"why": why_not(o, best, device)} for o in others],
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


def report(request: Request, given: Option, best: Option, others: list[Option]) -> str:
    cfg, device = request.cfg, request.device
    c, s, T = cfg.model, given.setting, cfg.training.max_seq_len
    precision = cfg.training.precision
    tflops = device.bf16_tflops if precision == "bf16" else device.fp32_tflops
    n = count_params(c)
    tokens = s.global_batch_size * T
    flops = flops_per_token(c, T, indexer_rows=cfg.training.indexer_loss_rows)
    t = given.time
    bandwidth = f"{device.memory_gb_s:,.0f} GB/s" if device.memory_gb_s else "unknown bandwidth (not counted)"
    lines = [
        f"{request.config_path.name} on {s.world_size} x {device.name}: {device.memory_gib:g} GiB, {tflops:g} TFLOP/s "
        f"{precision}, "
        f"memory {bandwidth}, {device.link_gb_s:g} GB/s between GPUs",
        "",
        f"Parameters  {n['total']:,}: " + ", ".join(f"{k} {v:,}" for k, v in n.items() if k != "total" and v),
        f"Batch       {s.global_batch_size} windows of {T:,} = {s.world_size} GPUs x {s.micro_batch_size} x "
        f"{s.accumulation_steps} accumulation; {tokens:,} tokens per step",
        f"Arithmetic  {flops['total'] / 1e9:.2f} GFLOP per token, useful only: "
        + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in flops.items() if k != "total" and v),
        "",
        f"Memory per GPU with {request.file.name}, micro-batch {s.micro_batch_size}, recomputed: {s.recomputed}; GiB",
        *(
            f"  {part:<24}{size / GIB:8.2f}"
            for part, size in given.memory.items()
            if part not in ("peak", "allocated") and size
        ),
        f"  {'peak':<24}{given.peak_gib:8.2f}   of {device.memory_gib:g}"
        + ("" if given.fits(device) else "   DOES NOT FIT"),
        "  (the peak is that of the backward pass or of the optimizer step, not the sum)",
        "",
        f"Step        {t.seconds:.2f} s predicted, {tokens / t.seconds:,.0f} tokens/s, MFU {t.mfu:.1%}",
        "            " + ", ".join(f"{part} {spent:.2f}" for part, spent in t.parts.items() if spent >= 0.005),
        f"            communication {t.communication:.2f} s, of which {t.exposed:.2f} s nothing hides",
        f"To the end  {cfg.training.max_steps:,} steps: {cfg.training.max_steps * t.seconds / 86400:.1f} days",
        f"Checkpoint  {checkpoint_bytes(cfg, None) / GIB:.1f} GiB each",
        "",
        f"Ways to run {s.global_batch_size} windows a step, best first:",
        "  ZeRO       micro  accum.  recomputed  peak GiB  s/step    MFU",
        *(_line(o, best, device) for o in _shown(others, given)),
        "",
        "Attention:",
        *(f"  {line}" for line in attention_comparison(c, device, cfg.training.indexer_loss_rows)),
        "",
        "Seconds are predicted, not measured: counted work over assumed shares of the peaks ("
        + ", ".join(f"{k} {v:g}" for k, v in asdict(cost.ASSUMED).items())
        + "). Measure with python -m training.tune.",
    ]
    return "\n".join(lines)


def _shown(others: list[Option], given: Option) -> list[Option]:
    """The best ones, the given one, and the last: what is furthest from fitting, or slowest. --json has all."""
    shown = others[:SHOWN]
    extra = [o for o in others[SHOWN:] if o.setting == given.setting]
    too_large = [o for o in others[SHOWN:] if o not in shown][-1:]
    return [*shown, *extra, *too_large]


def _line(o: Option, best: Option, device: Device) -> str:
    s = o.setting
    kind = f"{s.zero_stage} offload" if s.offload else f"{s.zero_stage}"
    return (
        f"  {kind:<9}  {s.micro_batch_size:>5}  {s.accumulation_steps:>6}  {s.recomputed:<10}  {o.peak_gib:>8.1f}  "
        f"{o.time.seconds:>6.2f}  {o.time.mfu:>5.1%}  {why_not(o, best, device)}"
    )


def write(request: Request, best: Option, folder: Path) -> tuple[Path, Path]:
    """The recommended run as a yaml and a DeepSpeed json in `folder`. ConfigError when they are there already."""
    cfg, s = request.cfg, best.setting
    yaml_path, json_path = folder / "plan.yaml", folder / "plan_ds_config.json"
    for path in (yaml_path, json_path):
        if path.exists():
            raise ConfigError(f"--write: {path} is there already; give another folder, or remove it")
    training = replace(
        cfg.training,
        micro_batch_size=s.micro_batch_size,
        gradient_accumulation_steps=s.accumulation_steps,
        global_batch_size=s.global_batch_size,
        gradient_checkpointing=s.recomputed != "none",
        checkpointing_scope="block" if s.recomputed == "none" else s.recomputed,
    )
    ds_config = request.files()[kind_of(s)].read_text()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        json_path.write_text(ds_config)
        yaml_path.write_text(
            f"# Recommended by training.plan for {s.world_size} x {request.device.name}: {best.peak_gib:.1f} GiB per "
            f"GPU and {best.time.seconds:.2f} s per step predicted.\n" + to_yaml(replace(cfg, training=training))
        )
    except OSError as err:
        raise ConfigError(f"--write {folder}: {err.strerror or err}") from err
    return yaml_path, json_path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's yaml")
    parser.add_argument("--deepspeed_config", type=Path, help="a ds_configs/*.json (default: ZeRO 2's for this link)")
    parser.add_argument("--gpus", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument(
        "--gpu",
        default="A40",
        metavar="NAME|GiB,TFLOPs,GB/s",
        help="A40, L40S, A100-80, H100, H200, ..., or memory, bf16 peak and link (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print everything for machines")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the recommended yaml and DeepSpeed json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.gpus < 1:
            raise ConfigError(f"--gpus {args.gpus} must be at least 1")
        device = parse(args.gpu)
        cfg = load_config(args.config, args.overrides)
        batch = plan_batch(cfg.training, args.gpus)
        file = args.deepspeed_config or DS_CONFIGS / ds_config_for(2, False, args.gpus, device)
        request = Request(cfg, args.config, batch, device, file)
        given = request.option(request.setting(file))
        others = ranked(request)
        best = others[0]
        if args.write and not best.fits(device):
            raise ConfigError(
                f"nothing fits {args.gpus} x {device.name}: the leanest way takes {best.peak_gib:.1f} GiB, offloading "
                f"included; more GPUs, or a smaller model"
            )
        written = write(request, best, args.write) if args.write else ()
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(cfg, given, best, others, device), indent=1))
    else:
        print(report(request, given, best, others))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
