"""What the folder of a run says about its use of time and devices: the numbers that training.doctor judges."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gsa.config import ModelConfig
from gsa.model import count_params
from training.planning.devices import find
from training.record.metrics_log import iter_rows
from training.record.run_folder import RunFolder

WARM_UP_STEPS = 3
"""Steps of a process that are passed over: they compile kernels, open connections and grow the allocator's pools."""
MOST_STEPS = 10_000
"""Of a process, that are judged: its newest. A run of months shows what it does now, and fits into memory."""
FEW_STEPS = 10
"""Fewer than this, and one odd step moves a share by a tenth: the report says that it is rough."""

THROTTLED_SHARE = 0.10
"""Of NVML's samples. Fewer are moments."""
CPU_NAMES = {"cpu", "x86_64", "amd64", "aarch64", "arm64"}
GIB = 2**30


class NoRunError(ValueError):
    """The folder holds nothing to judge; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What the run was told; None where its folder does not say.

    offload: where optimizer states or weights lie ("cpu", "nvme"). offloaded_gib: what masters and moments
    would take on each GPU, GiB.
    """

    world_size: int = 1
    zero_stage: int | None = None
    backend: str | None = None
    micro_batch_size: int | None = None
    accumulation_steps: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int | None = None
    save_interval: int | None = None
    async_save: bool | None = None
    eval_interval: int | None = None
    offload: str | None = None
    offloaded_gib: float | None = None


@dataclass(frozen=True)
class Gpu:
    """Medians over the window of what NVML said; shares from 0 to 1, None where it said nothing."""

    index: int
    utilisation: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    power_limit_w: float | None = None
    throttled: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retries:
    """Steps in which the allocator had to give memory back and ask anew, and the median seconds of the steps without.

    clean_seconds: of the fastest step where none was without.
    """

    steps: int
    total: int
    clean_seconds: float


@dataclass(frozen=True)
class Summary:
    """A window of a run. Seconds are those of rank 0; of one step, they are medians.

    steps: how many, from `first` to `last`. step_seconds: the whole step, without saves and evaluations.
    data, forward, backward, update, other: its parts; None where rows lack them. total_*: sums over the window.
    rank_wait: how much longer the slowest rank takes than the median one. written: when the last row was, unix time.
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
        """Of all the time, for so many seconds of every step."""
        return seconds / self.step_seconds * self.total_steps / self.total


def read(folder: Path, last: int | None = None) -> tuple[Summary, list[str]]:
    """The window to judge, at most its `last` steps, and what a reader should know about it.

    NoRunError when there is no run or no finished step; ValueError when metrics.jsonl is broken inside.
    """
    path = RunFolder(folder).metrics
    if not path.is_file():
        inside = sorted(p.parent for p in folder.glob("*/metrics.jsonl"))
        hint = f"; runs in it: {', '.join(map(str, inside))}" if inside else ", such as outputs/quickstart"
        raise NoRunError(f"{folder} holds no run (no metrics.jsonl); give the --output_dir of one{hint}")
    events, lives, final = _lives(path)
    window, notes = _window(lives, last)
    if not window:
        raise NoRunError(
            f"{folder} has no finished step with its seconds in metrics.jsonl yet; wait for the first ones of a live "
            f"run, and read the console of a dead one"
        )
    return _summary(folder, events if "event" in final else [*events, final], window, notes), notes


class _Life:
    """Step rows of one process: its newest, and how many it has finished."""

    def __init__(self) -> None:
        self.rows: deque[dict] = deque(maxlen=MOST_STEPS)
        self.finished = 0

    def add(self, row: dict) -> None:
        self.finished += 1
        self.rows.append(row)


def _lives(path: Path) -> tuple[list[dict], list[_Life], dict]:
    """Events; the last process that finished a step, and the one after it where that finished none; the last row."""
    events: list[dict] = []
    lives, final = [_Life()], {}
    for row in iter_rows(path):
        final = row
        if "event" in row:
            events.append(row)
        if row.get("event") in ("start", "resume"):
            lives = [life for life in lives if life.finished][-1:] + [_Life()]
        elif "loss" in row and "step" in row and _step_seconds(row) is not None:
            lives[-1].add(row)
    return events, lives, final


def _window(lives: list[_Life], last: int | None) -> tuple[list[dict], list[str]]:
    """Step rows of the last process that finished any, warm; and notes."""
    notes: list[str] = []
    life = next((life for life in reversed(lives) if life.finished), _Life())
    steps = list(life.rows)
    if steps and not lives[-1].finished:
        notes.append("no step is finished since the last resume: this is about the steps before it")
    if life.finished > MOST_STEPS:
        notes.append(f"of {life.finished:,} steps the last {MOST_STEPS:,} are judged")
    warm = steps[max(0, WARM_UP_STEPS - (life.finished - len(steps))) :]
    if steps and not warm:
        warm = steps[-1:]
        notes.append(f"only the first {len(steps)} steps of a process are there, which are slow: look again later")
    warm = warm if last is None else warm[-last:]
    if 1 < len(warm) < FEW_STEPS:
        notes.append(f"only {len(warm)} steps: the shares are rough")
    return warm, notes


def _summary(folder: Path, rows: list[dict], window: list[dict], notes: list[str]) -> Summary:
    config = read_mapping(folder / "config.yaml", yaml.safe_load, notes)
    ds_config = read_mapping(folder / "ds_config.json", json.loads, notes)
    run = read_mapping(folder / "run.json", json.loads, notes)
    env = read_mapping(folder / "env.json", json.loads, notes)
    device = next((row for row in reversed(rows) if row.get("event") == "device"), {})
    name = device.get("name") or next(iter(env.get("devices", [])), None)
    known = find(name) if name else None
    seconds = [_step_seconds(row) for row in window]
    total_saves, saves = _stalls(rows, window, "seconds_save", "save", "save_stall_seconds")
    total_evals, evals = _stalls(rows, window, "seconds_eval", "eval", "eval_seconds")
    pairs = [(_number(row, "rank_seconds_slowest"), _number(row, "rank_seconds_median")) for row in window]
    waits = [slowest - middle for slowest, middle in pairs if slowest is not None and middle is not None]
    gpus = _gpus(window)
    return Summary(
        first=window[0]["step"],
        last=window[-1]["step"],
        steps=len(window),
        step_seconds=median(seconds),
        total_steps=sum(seconds),
        settings=_settings(config, ds_config, run, rows),
        data=_median(window, "seconds_data"),
        forward=_median(window, "seconds_forward"),
        backward=_median(window, "seconds_backward"),
        update=_median(window, "seconds_step"),
        other=_median(window, "seconds_other"),
        total_data=sum(_number(row, "seconds_data") or 0.0 for row in window),
        total_saves=total_saves,
        saves=saves,
        total_evals=total_evals,
        evals=evals,
        rank_wait=median(waits) if waits else None,
        mfu=_median(window, "mfu"),
        memory_gib=max(_number(row, "memory_gib") or 0.0 for row in window) or None,
        device=name,
        device_memory_gib=_number(device, "memory_gib") or (known.memory_gib if known else None),
        on_gpu=bool(gpus) or (name is not None and name.lower() not in CPU_NAMES),
        gpus=gpus,
        retries=_retries(window),
        written=_number(rows[-1], "time"),
    )


def read_mapping(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict:
    """A file of the run as a mapping; an empty one, and a note, where it is missing or broken."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is missing or cannot be read: what it would say is not taken into account")
    return {}


def _settings(config: dict, ds_config: dict, run: dict, rows: list[dict]) -> Settings:
    training, zero = config.get("training") or {}, ds_config.get("zero_optimization") or {}
    started = next((row for row in reversed(rows) if row.get("event") in ("start", "resume")), {})
    world_size = run.get("world_size") or started.get("world_size") or 1
    places = [(zero.get(part) or {}).get("device") for part in ("offload_optimizer", "offload_param")]
    offload = next((place for place in places if place in ("cpu", "nvme")), None)
    return Settings(
        world_size=world_size,
        zero_stage=zero.get("stage", run.get("zero_stage")),
        backend=run.get("backend") or training.get("backend"),
        micro_batch_size=ds_config.get("train_micro_batch_size_per_gpu") or training.get("micro_batch_size"),
        accumulation_steps=ds_config.get("gradient_accumulation_steps"),
        gradient_checkpointing=bool(training.get("gradient_checkpointing")),
        compile=bool(training.get("compile")),
        num_workers=(config.get("data") or {}).get("num_workers"),
        save_interval=training.get("save_interval"),
        async_save=training.get("async_save"),
        eval_interval=training.get("eval_interval"),
        offload=offload,
        offloaded_gib=_offloaded_gib(config, world_size) if offload else None,
    )


def _offloaded_gib(config: dict, world_size: int) -> float | None:
    """Float32 masters and two moments, 12 bytes per parameter, over the ranks."""
    try:
        parameters = count_params(ModelConfig(**config["model"]))["total"]
    except (KeyError, TypeError, ValueError):  # a configuration of another version
        return None
    return 12 * parameters / world_size / GIB


def _number(row: dict, key: str) -> float | None:
    value = row.get(key)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _median(rows: list[dict], key: str) -> float | None:
    values = [value for row in rows if (value := _number(row, key)) is not None]
    return median(values) if values else None


def _step_seconds(row: dict) -> float | None:
    """Wall time of the step; the sum of its parts where the row has only those."""
    whole = _number(row, "seconds")
    parts = [_number(row, f"seconds_{part}") for part in ("data", "forward", "backward", "step")]
    return whole or sum(part for part in parts if part is not None) or None


def _stalls(rows: list[dict], window: list[dict], field: str, event: str, event_field: str) -> tuple[float, int]:
    """Seconds that the loop stood still within the window, and how often.

    From the rows; from the events where rows lack the field. Both leave out what follows the window's last step.
    """
    if all(_number(row, field) is not None for row in window):
        spent = [_number(row, field) for row in window]
    else:
        first, last = window[0]["step"] - 1, window[-1]["step"] - 1
        told = [row for row in rows if row.get("event") == event and first <= row.get("step", -1) <= last]
        spent = [_number(row, event_field) or 0.0 for row in told]
    return sum(spent), sum(seconds > 0 for seconds in spent)


def _retries(window: list[dict]) -> Retries | None:
    if all(_number(row, "allocator_retries") is None for row in window):
        return None
    counts = [int(_number(row, "allocator_retries") or 0) for row in window]
    seconds = [_step_seconds(row) for row in window]
    clean = [spent for spent, count in zip(seconds, counts, strict=True) if not count]
    return Retries(sum(count > 0 for count in counts), sum(counts), median(clean) if clean else min(seconds))


def _gpus(window: list[dict]) -> tuple[Gpu, ...]:
    fields = ("utilisation", "clock_mhz", "max_clock_mhz", "power_limit_w", "throttled")
    found = sorted({int(m[1]) for row in window for key in row if (m := re.match(r"gpu/(\d+)/", key))})
    return tuple(
        Gpu(
            index,
            *(_median(window, f"gpu/{index}/{field}") for field in fields),
            _reasons([row.get(f"gpu/{index}/throttle_reasons") for row in window]),
        )
        for index in found
    )


def _reasons(said: list[str | None]) -> tuple[str, ...]:
    """Reasons that more than THROTTLED_SHARE of the rows name."""
    words = [text.split(",") if text else [] for text in said]
    return tuple(
        reason
        for reason in sorted({reason for row in words for reason in row})
        if sum(reason in row for row in words) > THROTTLED_SHARE * len(said)
    )
