"""Where the time of a run goes and what its devices do, as numbers: what diagnosis.py draws its verdicts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gsa.units import GIB
from training.planning.devices import find_device
from training.record.metrics_log import DamagedRowsError
from training.record.reader import NoRunError, Record, Settings, Steps

WARM_UP_STEPS = 3
"""The first steps of a launch are left out: they compile kernels, open connections and grow the allocator's pools."""
MOST_STEPS = 10_000
"""Only so many of the newest steps are analysed, to bound memory and to describe the present."""
FEW_STEPS = 10
"""With fewer steps than this, one odd step moves a share by a tenth: a note says that the shares are rough."""
THROTTLED_SHARE = 0.10
"""A card counts as throttled above this share of NVML's samples; less is a moment."""
CPU_NAMES = {"cpu", "x86_64", "amd64", "aarch64", "arm64"}


@dataclass(frozen=True)
class Gpu:
    """Medians over the window of what NVML measured; shares from 0 to 1, None where there is no value."""

    index: int
    utilisation: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    power_limit_w: float | None = None
    throttled: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retries:
    """Steps in which the allocator had to free its cache and try again.

    clean_seconds: median of the steps without a retry; the fastest step where every step has one.
    """

    steps: int
    total: int
    clean_seconds: float


@dataclass(frozen=True)
class Summary:
    """A window of steps. Seconds are those of rank 0; for one step, they are medians.

    steps: how many, from `first` to `last`. step_seconds: the whole step, without saves and evaluations.
    data, forward, backward, update, other: its parts; None where rows lack them. total_*: sums over the window.
    rank_wait: how much longer the slowest rank takes than the median one. written: when the last row was, unix s.
    offloaded_gib: what masters and moments would take on each GPU, for a run that offloads them.
    """

    first: int
    last: int
    steps: int
    step_seconds: float
    total_steps: float
    settings: Settings = Settings()
    data: float | None = None
    forward: float | None = None
    backward: float | None = None
    update: float | None = None
    other: float | None = None
    total_data: float = 0.0
    total_saves: float = 0.0
    saves: int = 0
    total_evals: float = 0.0
    evals: int = 0
    rank_wait: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    offloaded_gib: float | None = None
    device: str | None = None
    device_memory_gib: float | None = None
    on_gpu: bool = False
    gpus: tuple[Gpu, ...] = ()
    retries: Retries | None = None
    written: float | None = None

    @property
    def total(self) -> float:
        return self.total_steps + self.total_saves + self.total_evals

    def share(self, seconds: float) -> float:
        """The share of all the time that so many seconds of every step are."""
        return seconds / self.step_seconds * self.total_steps / self.total


def summarise(record: Record, last: int | None = None) -> tuple[Summary, list[str]]:
    """The window to analyse, at most its `last` steps, and notes on it for the reader.

    Raises NoRunError when no step is finished, DamagedRowsError when metrics.jsonl is damaged inside.
    """
    if record.damage is not None:
        raise DamagedRowsError(record.damage)
    steps, notes = record.steps, []
    seconds = _step_seconds(steps)
    window = _window(record, seconds, last, notes)

    def values(name: str) -> np.ndarray:
        return steps.of(name)[window]

    seconds, known = seconds[window], find_device(record.device.name) if record.device.name else None
    saves, evals = (record.stalls(event)[0][window] for event in ("save", "eval"))
    gpus = _gpus(steps, values)
    return Summary(
        first=int(values("step")[0]),
        last=int(values("step")[-1]),
        steps=len(window),
        step_seconds=float(np.median(seconds)),
        total_steps=float(seconds.sum()),
        settings=record.settings,
        data=_median(values("seconds_data")),
        forward=_median(values("seconds_forward")),
        backward=_median(values("seconds_backward")),
        update=_median(values("seconds_step")),
        other=_median(values("seconds_other")),
        total_data=float(np.nansum(values("seconds_data"))),
        total_saves=float(saves.sum()),
        saves=int((saves > 0).sum()),
        total_evals=float(evals.sum()),
        evals=int((evals > 0).sum()),
        rank_wait=_median(values("rank_seconds_slowest") - values("rank_seconds_median")),
        mfu=_median(values("mfu")),
        memory_gib=float(np.nan_to_num(values("memory_gib")).max()) or None,
        offloaded_gib=_offloaded_gib(record),
        device=record.device.name,
        device_memory_gib=record.device.memory_gib or (known.memory_gib if known else None),
        on_gpu=bool(gpus) or (record.device.name is not None and record.device.name.lower() not in CPU_NAMES),
        gpus=gpus,
        retries=_retries(values("allocator_retries"), seconds),
        written=record.last_written,
    ), notes


def _step_seconds(steps: Steps) -> np.ndarray:
    """(n,) wall time of each step; the sum of its parts where the row has only those."""
    whole = np.nan_to_num(steps.of("seconds"))
    parts = sum(np.nan_to_num(steps.of(f"seconds_{part}")) for part in ("data", "forward", "backward", "step"))
    return np.where(whole > 0, whole, parts)


def _window(record: Record, seconds: np.ndarray, last: int | None, notes: list[str]) -> np.ndarray:
    """Indices of the newest steps of the last launch that finished any, without its first WARM_UP_STEPS."""
    steps, timed = record.steps, np.flatnonzero(seconds > 0)
    if not len(timed):
        raise NoRunError(
            f"{record.folder} has no finished step with its seconds in metrics.jsonl yet; wait for the first ones of a "
            f"live run, and read the console of a dead one"
        )
    launch = steps.launch[timed].max()
    rows = timed[steps.launch[timed] == launch]
    finished = int(steps.place[rows].max())
    if launch < record.launches:
        notes.append("no step is finished since the last resume: this is about the steps before it")
    if finished > MOST_STEPS:
        notes.append(f"of {finished:,} steps the last {MOST_STEPS:,} are analysed")
    rows = rows[-MOST_STEPS:]
    warm = rows[steps.place[rows] > WARM_UP_STEPS]
    if not len(warm):
        warm = rows[-1:]
        notes.append(f"only the first {len(rows)} steps of a launch are there, which are slow: look again later")
    warm = warm if last is None else warm[-last:]
    if 1 < len(warm) < FEW_STEPS:
        notes.append(f"only {len(warm)} steps: the shares are rough")
    return warm


def _offloaded_gib(record: Record) -> float | None:
    """Float32 masters and two moments, 12 bytes per parameter, over the ranks."""
    if record.settings.offload is None or not record.parameters:
        return None
    return 12 * record.parameters["total"] / (record.settings.world_size or 1) / GIB


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _retries(counts: np.ndarray, seconds: np.ndarray) -> Retries | None:
    if not np.isfinite(counts).any():
        return None
    counts = np.nan_to_num(counts)
    clean = _median(seconds[counts == 0])
    return Retries(int((counts > 0).sum()), int(counts.sum()), float(seconds.min()) if clean is None else clean)


def _gpus(steps: Steps, values: Callable[[str], np.ndarray]) -> tuple[Gpu, ...]:
    fields = ("utilisation", "clock_mhz", "max_clock_mhz", "power_limit_w", "throttled")
    medians = {i: [_median(values(f"gpu/{i}/{field}")) for field in fields] for i in steps.gpus()}
    return tuple(
        Gpu(i, *found, _reasons(steps, values(f"gpu/{i}/throttle_reasons")))
        for i, found in medians.items()
        if any(value is not None for value in found)
    )


def _reasons(steps: Steps, named: np.ndarray) -> tuple[str, ...]:
    """The reasons that more than THROTTLED_SHARE of the rows name. named: (n,) indices into steps.words, or NaN."""
    rows = [steps.words[int(i)].split(",") if np.isfinite(i) else [] for i in named]
    return tuple(
        reason
        for reason in sorted({reason for row in rows for reason in row if reason})
        if sum(reason in row for row in rows) > THROTTLED_SHARE * len(rows)
    )
