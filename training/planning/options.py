"""Ways to run one global batch on given GPUs, each with its predicted memory and time, ranked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gsa.config import ModelConfig
from gsa.model import flops_per_token
from gsa.units import GIB, size_text
from training.config import BatchPlan, ConfigError, RunConfig
from training.config.deepspeed import DEFAULT, resolve_ds_config
from training.planning import cost_model as cost
from training.planning.cost_model import ParallelSetting, StepTime, setting_of
from training.planning.devices import Device

USABLE = 0.90
"""Share of a device's memory that a plan may use. The rest is for what no count knows, such as other processes."""
TIE = 0.02
"""Relative difference of predicted times below which the model cannot say which one is faster."""
LARGEST_MICRO_BATCH = 64
DS_CONFIGS = DEFAULT.parent
SLOW_LINK_GB_S = 100.0
"""GPUs whose link is slower than this are connected by PCIe, faster ones by NVLink."""

ZeroKind = tuple[int, bool]
"""A ZeRO stage, and whether the optimizer is offloaded."""


@dataclass(frozen=True)
class Option:
    """A setting with its predicted memory (bytes by part, see `cost_model.memory_bytes`) and time."""

    setting: ParallelSetting
    memory: dict[str, float]
    time: StepTime

    @property
    def peak_gib(self) -> float:
        """Peak memory per GPU."""
        return self.memory["peak"] / GIB

    def fits(self, device: Device) -> bool:
        return self.peak_gib <= USABLE * device.memory_gib


@dataclass(frozen=True)
class Request:
    """What to plan: a configuration on `batch.world_size` devices, with the DeepSpeed settings in `file`."""

    cfg: RunConfig
    config_path: Path
    batch: BatchPlan
    device: Device
    file: Path

    def setting(self, file: Path) -> ParallelSetting:
        """The configuration's setting with another DeepSpeed file. ConfigError when the two contradict each other."""
        return setting_of(self.cfg, resolve_ds_config(file, self.cfg, self.batch, self.config_path), self.batch)

    def option(self, s: ParallelSetting) -> Option:
        """Predicts memory and time of a setting. ConfigError when the device's peak at the precision is unknown."""
        cfg, T, rows = self.cfg, self.cfg.training.max_seq_len, self.cfg.training.indexer_loss_rows
        bf16 = cfg.training.precision == "bf16"
        time = cost.step_time(cfg.model, T, s, self.device, bf16=bf16, rows=rows)
        if time is None:
            raise ConfigError(
                f"the peak of {self.device.name} at training.precision={cfg.training.precision} is not known; give "
                f"--gpu as <GiB>,<TFLOPs>,<GB/s to other GPUs>,<GB/s of its memory>"
            )
        return Option(s, cost.memory_bytes(cfg.model, T, s, bf16=bf16, rows=rows), time)

    def files(self) -> dict[ZeroKind, Path]:
        """DeepSpeed files by kind: those of ds_configs/ that the configuration can use, and `file` for its own kind."""
        kinds = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
        if self.batch.world_size == 1 and self.cfg.training.precision == "fp32":  # there is nothing to shard
            kinds = [(0, False), (2, True), (3, True)]
        found = {}
        for kind in kinds:
            file = DS_CONFIGS / ds_config_for(*kind, self.batch.world_size, self.device)
            with suppress(ConfigError):
                self.setting(file)
                found[kind] = file
        return found | {zero_kind(self.setting(self.file)): self.file}


def zero_kind(s: ParallelSetting) -> ZeroKind:
    return s.zero_stage, s.offload


def ds_config_for(stage: int, offload: bool, world_size: int, device: Device) -> str:
    """The name of the file in ds_configs/ for a ZeRO stage, with or without offloading, on these devices."""
    if stage == 2 and world_size > 1 and not offload:
        return "zero2_pcie.json" if device.link_gb_s < SLOW_LINK_GB_S else "zero2_nvlink.json"
    return f"zero{stage}{'_offload' * offload}.json"


def alternatives(request: Request) -> Iterator[ParallelSetting]:
    """Every ZeRO stage, micro-batch size and scope of recomputation with the given global batch."""
    per_rank = request.batch.micro_batch_size * request.batch.accumulation_steps
    for file in request.files().values():
        base = request.setting(file)
        for micro in range(1, min(per_rank, LARGEST_MICRO_BATCH) + 1):
            if per_rank % micro:
                continue
            for recomputed in ("none", "ffn", "block"):
                yield replace(base, micro_batch_size=micro, accumulation_steps=per_rank // micro, recomputed=recomputed)


def ranked(request: Request) -> list[Option]:
    """Options that fit, the fastest first, then those that do not fit.

    Options whose times differ by less than TIE count as equally fast. Among them the given setting comes first, since
    a change would gain nothing; then lower ZeRO stages; then less memory. Offloading is considered only when the given
    setting offloads or nothing fits without it.
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
    """Why `o` is not the recommended option, in a few words; "recommended" when it is."""
    if not o.fits(device):
        return f"does not fit: {size_text(o.peak_gib * GIB)} of {size_text(USABLE * device.memory_gib * GIB)} usable"
    if o is best:
        return "recommended"
    if o.time.seconds <= best.time.seconds * (1 + TIE):
        more = ", more communication" if o.time.communication > 1.01 * best.time.communication else ""
        return f"equally fast: {o.peak_gib - best.peak_gib:+.1f} GiB{more}"
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


def attention_comparison(c: ModelConfig, device: Device, rows: float) -> list[str]:
    """Lines that compare GSA with dense attention at several lengths: useful arithmetic and predicted seconds."""
    if not c.sparse:
        return ["This model has dense attention (model.sparse=false)."]
    dense = replace(c, sparse=False)
    peak = device.bf16_tflops * 1e12  # cancels in the ratios, so either precision's peak would do
    lines = ["length   useful FLOPs, relative to dense   predicted seconds, relative to dense"]
    for T in (1024, 2048, 4096, 8192, 32768, 131072):
        flops = _attention_flops(c, T, rows) / _attention_flops(dense, T, rows)
        seconds = cost.attention_seconds(c, T, peak, sparse=True) + cost.indexer_seconds(c, T, peak, rows)
        seconds /= cost.attention_seconds(dense, T, peak, sparse=False)
        lines.append(f"{T:>7,}  {flops:>33.2f}   {seconds:>36.2f}")
    wins = next(
        (T for T in range(256, 2**20, 256) if _attention_flops(c, T, rows) < _attention_flops(dense, T, rows)), None
    )
    lines.append(
        f"GSA needs less arithmetic than dense attention from {wins:,} tokens on."
        if wins
        else "GSA needs more arithmetic than dense attention at every length."
    )
    lines.append(
        "In seconds, GSA costs more than dense attention at every length: today's kernels visit every visible key and "
        "mask those that are not selected. GSA buys quality of selection, not speed."
    )
    return lines


def _attention_flops(c: ModelConfig, T: int, rows: float) -> float:
    parts = flops_per_token(c, T, indexer_rows=rows)
    return parts["attention"] + parts["indexer"]
