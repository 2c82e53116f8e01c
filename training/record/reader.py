"""Reads the folder of a run in whatever state it is: what is missing or broken becomes a note, not an error.

This is the only reader of a run folder for tools that look at a run afterwards. Step rows become columns of numbers,
since days of rows do not fit into memory as dicts. Discarded branches are the rows that a resume or a rollback moved
to segments/.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from gsa import yaml_text
from gsa.checkpoint.manifest import no_run_in
from gsa.config import ModelConfig
from gsa.files import open_regular, read_small_file
from gsa.model import count_params
from gsa.units import MIB
from training.config.exit_codes import ExitCode, Refusal

_PARTS = ("config.yaml", "run.json", "metrics.jsonl")
_LARGEST = 1e300
"""A number beyond this is not a measurement, and sums with it overflow."""
_STALLS = {"save": ("seconds_save", "save_stall_seconds"), "eval": ("seconds_eval", "eval_seconds")}
"""Event -> the field of step rows, and the field of the event, that hold the seconds in which training stood still."""


class NoRunError(Refusal):
    """The folder holds no run; the message says what to do."""

    exit_code = ExitCode.REFUSED_INPUT


@dataclass(frozen=True)
class Steps:
    """Rows of optimizer steps as columns, each step once, in order.

    columns: name -> (n,) float64, NaN where a row has no finite number of that name. Columns of text ("stage" and
        ".../throttle_reasons") hold indices into `words`.
    launch: (n,) how many start and resume events stand before the row in its file.
    place: (n,) the place of the row among those of its launch, from 1 on.
    layers: (step, name -> one value per layer, NaN where a layer has none) of the rows that measured layers.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    launch: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    place: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    words: tuple[str, ...] = ()
    layers: tuple[tuple[float, dict[str, list[float]]], ...] = ()

    def __len__(self) -> int:
        return len(self.launch)

    def of(self, name: str) -> np.ndarray:
        """(n,) float64: the column, all NaN where no row has it."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        finite = self.of(name)[np.isfinite(self.of(name))]
        return float(finite[-1]) if len(finite) else None

    def stages(self) -> list[tuple[float, str]]:
        """(step, stage of attention) of the first row and of every row where it changes."""
        known = np.isfinite(self.of("stage"))
        stage, step = self.of("stage")[known].astype(int), self.of("step")[known]
        changed = np.flatnonzero(np.diff(stage, prepend=-1))
        return [(float(step[i]), self.words[stage[i]]) for i in changed]

    def gpus(self) -> list[int]:
        """Indices of the GPUs that rows have values of."""
        parts = [name.split("/") for name in self.columns if name.startswith("gpu/")]
        return sorted({int(part[1]) for part in parts if len(part) == 3 and part[1].isdecimal()})


@dataclass(frozen=True)
class Settings:
    """What config.yaml, ds_config.json, run.json and the last launch say; None where they do not say.

    offload: where optimizer states or weights lie, "cpu" or "nvme".
    """

    world_size: int | None = None
    zero_stage: int | None = None
    backend: str | None = None
    micro_batch_size: int | None = None
    accumulation_steps: int | None = None
    max_seq_len: int | None = None
    max_steps: int | None = None
    grad_clip: float | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int | None = None
    save_interval: int | None = None
    async_save: bool | None = None
    eval_interval: int | None = None
    offload: str | None = None


@dataclass(frozen=True)
class Device:
    """The accelerator of the newest launch, by its `device` event, its name also by env.json."""

    name: str | None = None
    memory_gib: float | None = None
    peak_tflops: float | None = None
    peak_source: str | None = None


@dataclass(frozen=True)
class Record:
    """Everything that the folder holds besides checkpoints; empty where it holds nothing.

    steps, events: of metrics.jsonl. discarded_steps, discarded_events: of segments/.
    launches: start and resume events in metrics.jsonl.
    run_json, config, ds_config, env: run.json, config.yaml, ds_config.json, env.json.
    notes: what is missing or broken. damage: the first line inside metrics.jsonl that is not JSON, and how to mend it.
    read_at: unix s.
    """

    folder: Path
    label: str
    steps: Steps
    events: tuple[dict, ...]
    launches: int
    discarded_steps: Steps
    discarded_events: tuple[dict, ...]
    run_json: dict
    config: dict
    ds_config: dict
    env: dict
    notes: tuple[str, ...]
    damage: str | None
    read_at: float

    def events_of(self, event: str) -> list[dict]:
        """The events of that name in metrics.jsonl that have a step, oldest first."""
        return [row for row in self.events if row["event"] == event and finite(row, "step") is not None]

    @cached_property
    def settings(self) -> Settings:
        training, data = mapping(self.config.get("training")), mapping(self.config.get("data"))
        zero = mapping(self.ds_config.get("zero_optimization"))
        started = next((row for row in reversed(self.events) if row["event"] in ("start", "resume")), {})
        places = [mapping(zero.get(part)).get("device") for part in ("offload_optimizer", "offload_param")]
        return Settings(
            world_size=_count(self.run_json.get("world_size")) or _count(started.get("world_size")),
            zero_stage=_count(zero.get("stage", self.run_json.get("zero_stage"))),
            backend=_text(self.run_json.get("backend")) or _text(training.get("backend")),
            micro_batch_size=_count(self.ds_config.get("train_micro_batch_size_per_gpu"))
            or _count(training.get("micro_batch_size")),
            accumulation_steps=_count(self.ds_config.get("gradient_accumulation_steps")),
            max_seq_len=_count(training.get("max_seq_len")),
            max_steps=_count(training.get("max_steps")),
            grad_clip=finite(training, "grad_clip"),
            gradient_checkpointing=training.get("gradient_checkpointing") is True,
            compile=training.get("compile") is True,
            num_workers=_count(data.get("num_workers")),
            save_interval=_count(training.get("save_interval")),
            async_save=value if isinstance(value := training.get("async_save"), bool) else None,
            eval_interval=_count(training.get("eval_interval")),
            offload=next((place for place in places if place in ("cpu", "nvme")), None),
        )

    @cached_property
    def device(self) -> Device:
        row = next((row for row in reversed(self.events) if row["event"] == "device"), {})
        listed = self.env.get("devices")
        first = listed[0] if isinstance(listed, list) and listed else None
        return Device(
            _text(row.get("name")) or _text(first),
            finite(row, "memory_gib"),
            finite(row, "peak_tflops"),
            _text(row.get("peak_source")),
        )

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by part of the model, with "total"; empty if the model is unknown or of another version."""
        try:
            return count_params(ModelConfig(**self.config["model"]))
        except (KeyError, TypeError, ValueError):
            return {}

    @property
    def last_written(self) -> float | None:
        """When the newest line of metrics.jsonl was written, unix s."""
        times = [v for row in self.events if (v := finite(row, "time")) is not None]
        of_steps = self.steps.of("time")
        return max([*times, *of_steps[np.isfinite(of_steps)][-1:].tolist()], default=None)

    def stalls(self, event: Literal["save", "eval"]) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """Seconds in which training stood still for saves or for evaluations.

        Returns (n,) the seconds before each step, from the rows, or from the events where the row has no such field;
        and (step, seconds) of the events that are not in these.
        """
        in_rows, in_event = _STALLS[event]
        before, step, rest = self.steps.of(in_rows), self.steps.of("step"), []
        absent = ~np.isfinite(before)
        before = np.where(absent, 0.0, np.maximum(before, 0.0))
        for row in self.events_of(event):
            i, seconds = int(np.searchsorted(step, row["step"], side="right")), max(0.0, finite(row, in_event) or 0.0)
            if i < len(step) and absent[i]:
                before[i] += seconds
            else:
                rest.append((row["step"], seconds))
        return before, rest


def read(folder: Path, label: str | None = None, *, newest: int | None = None) -> Record:
    """Reads the folder; `label` is what reports call the run, by default the folder's name.

    newest: hold only so many of the newest step rows, to bound memory, and leave segments/ unread.
    Raises NoRunError when nothing in `folder` belongs to a run.
    """
    if not any((folder / name).is_file() for name in _PARTS) and not any(folder.glob("step_*")):
        inside = sorted({p.parent for name in _PARTS for p in folder.glob(f"*/{name}")})
        hint = f"; runs in it: {', '.join(map(str, inside))}" if inside else ""
        raise NoRunError(f"{no_run_in(folder)}{hint}")
    notes: list[str] = []
    curve, discarded = _Rows(newest), _Rows(newest)
    if (folder / "metrics.jsonl").is_file():
        curve.read(folder / "metrics.jsonl", notes)
    else:
        notes.append("metrics.jsonl is missing: there is no step and no event to show")
    if newest is None:
        for path in sorted((folder / "segments").glob("metrics_*.jsonl"), key=lambda p: (len(p.name), p.name)):
            discarded.read(path, notes)
    return Record(
        folder,
        folder.name if label is None else label,
        _in_order(curve.steps(), notes),
        tuple(curve.events),
        curve.launches,
        discarded.steps(),
        tuple(discarded.events),
        run_json=_mapping(folder / "run.json", json.loads, notes),
        config=_mapping(folder / "config.yaml", _yaml, notes),
        ds_config=_mapping(folder / "ds_config.json", json.loads, notes),
        env=_mapping(folder / "env.json", json.loads, notes),
        notes=tuple(notes),
        damage=curve.damage,
        read_at=time.time(),
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p) for p in parts]


def finite(row: dict, key: str) -> float | None:
    """The number in `row[key]`; None where there is none or it is not finite."""
    return _real(row.get(key))


def mapping(value: object) -> dict:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _real(value: object) -> float | None:
    return float(value) if type(value) in (int, float) and -_LARGEST < value < _LARGEST else None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


class _Rows:
    """Sorts the lines of metrics files into columns of step rows, and events."""

    def __init__(self, newest: int | None) -> None:
        self.events: list[dict] = []
        self.launches = 0
        self.damage: str | None = None
        self._held: deque[tuple[dict, int, int]] | None = None if newest is None else deque(maxlen=newest)
        self._columns: dict[str, array] = {}
        self._words: dict[str, int] = {}
        self._launch, self._place = array("q"), array("q")
        self._layers: list[tuple[float, dict[str, list[float]]]] = []

    def read(self, path: Path, notes: list[str]) -> None:
        broken, wrong, place = 0, None, 0
        try:
            for number, row, fault in _lines(path):
                if wrong is not None and self.damage is None:
                    self.damage = wrong
                if row is None:
                    broken += 1
                    wrong = f"{path}, line {number}: {fault}; restore the file or delete the line"
                elif isinstance(row.get("event"), str):
                    self.events.append(row)
                    if row["event"] in ("start", "resume"):
                        self.launches, place = self.launches + 1, 0
                elif finite(row, "step") is not None and "loss" in row:
                    place += 1
                    if self._held is None:
                        self._add(row, self.launches, place)
                    else:
                        self._held.append((row, self.launches, place))
                else:
                    broken += 1
        except OSError as err:
            notes.append(f"{path.name} cannot be read: {err.strerror}")
        if broken:
            notes.append(f"{path.name}: {broken} line(s) are torn or no rows, and left out")

    def _add(self, row: dict, launch: int, place: int) -> None:
        for name, value in row.items():
            if name == "stage" or name.endswith("/throttle_reasons"):
                value = self._words.setdefault(value, len(self._words)) if isinstance(value, str) else None
            if (real := _real(value)) is not None:
                column = self._columns.setdefault(name, array("d"))
                column.extend([math.nan] * (len(self._launch) - len(column)))
                column.append(real)
        self._launch.append(launch)
        self._place.append(place)
        if layers := _layers(row):
            self._layers.append((row["step"], layers))

    def steps(self) -> Steps:
        for held in self._held or ():
            self._add(*held)
        for column in self._columns.values():
            column.extend([math.nan] * (len(self._launch) - len(column)))
        columns = {name: np.frombuffer(column, np.float64) for name, column in self._columns.items() if len(column)}
        if not columns:
            return Steps()
        launch, place = (np.frombuffer(column, np.int64) for column in (self._launch, self._place))
        return Steps(columns, launch, place, tuple(self._words), tuple(self._layers))


def _lines(path: Path) -> Iterator[tuple[int, dict | None, str]]:
    """(number, row, "") of each line; (number, None, what is wrong with it) where it is no row. Skips blank lines."""
    with open(open_regular(path), encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip("\x00 \t\r\n"):
                continue
            try:
                row, fault = json.loads(line), "not a JSON object"
            except (ValueError, RecursionError) as err:
                row, fault = None, f"not JSON ({getattr(err, 'msg', err)})"
            yield (number, row, "") if isinstance(row, dict) else (number, None, fault)


def _layers(row: dict) -> dict[str, list[float]]:
    found = mapping(row.get("layers"))
    return {
        str(name): [math.nan if (real := _real(value)) is None else real for value in values]
        for name, values in found.items()
        if isinstance(values, list) and values
    }


def _in_order(steps: Steps, notes: list[str]) -> Steps:
    """Sorts by step; of rows with the same step the last one counts."""
    number = steps.of("step")
    if not (np.diff(number) <= 0).any():
        return steps
    _, from_end = np.unique(number[::-1], return_index=True)
    kept = len(number) - 1 - from_end
    notes.append(f"metrics.jsonl: {len(number) - len(kept)} row(s) repeat a step; the last of each is shown")
    columns = {name: column[kept] for name, column in steps.columns.items()}
    layers = tuple(sorted(dict(steps.layers).items()))
    return Steps(columns, steps.launch[kept], steps.place[kept], steps.words, layers)


MAX_BYTES = 16 * MIB
"""Size of run.json, config.yaml and the like."""


def _yaml(text: str) -> Any:
    try:
        return yaml_text.load(text)
    except yaml.YAMLError as err:
        raise ValueError("not yaml") from err


def _mapping(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict:
    try:
        found = parse(read_small_file(path, MAX_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is missing or cannot be read")
    return {}
