"""The folder of a run, read in whatever state it is: what is missing becomes a note, never an error."""

from __future__ import annotations

import json
import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_PARTS = ("config.yaml", "run.json", "metrics.jsonl")
_LARGEST = 1e300
"""Beyond this a number is no measurement, and sums of it overflow."""


class NoRunError(ValueError):
    """The folder holds nothing of a run; the message says what to do."""


@dataclass(frozen=True)
class Steps:
    """Rows of optimizer steps as columns.

    columns: name -> (n,) float64, NaN where a row has no finite number of that name.
    stages: (step, stage of attention) of the first row and of every row where it changes.
    layers: (step, name -> one value per layer, NaN where a layer has none) of the rows that measured layers.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    stages: tuple[tuple[float, str], ...] = ()
    layers: tuple[tuple[float, dict[str, list[float]]], ...] = ()

    def __len__(self) -> int:
        return len(self.columns["step"]) if "step" in self.columns else 0

    def of(self, name: str) -> np.ndarray:
        """(n,) float64: the column, all NaN where no row has it."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def has(self, name: str) -> bool:
        return name in self.columns

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        finite = self.of(name)[np.isfinite(self.of(name))]
        return float(finite[-1]) if len(finite) else None


@dataclass(frozen=True)
class Record:
    """Everything that the folder says; empty where it says nothing.

    steps, events: of the one curve. dead_steps, dead_events: those of segments/, which a resume set aside.
    run, config, ds_config, env: run.json, config.yaml, ds_config.json, env.json. notes: what is missing or broken.
    read_at: unix s.
    """

    folder: Path
    label: str
    steps: Steps
    events: tuple[dict, ...]
    dead_steps: Steps
    dead_events: tuple[dict, ...]
    run: dict
    config: dict
    ds_config: dict
    env: dict
    notes: tuple[str, ...]
    read_at: float

    def told(self, event: str) -> list[dict]:
        """Events of that name in the curve, oldest first, that know their step."""
        return [row for row in self.events if row["event"] == event and finite(row, "step") is not None]


def read(folder: Path, label: str) -> Record:
    """Raises NoRunError when nothing in `folder` belongs to a run."""
    if not any((folder / name).is_file() for name in _PARTS) and not any(folder.glob("step_*")):
        inside = sorted({p.parent for name in _PARTS for p in folder.glob(f"*/{name}")})
        hint = f"; runs in it: {', '.join(map(str, inside))}" if inside else ", such as outputs/quickstart"
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise NoRunError(f"{folder} {what}; give the --output_dir of one{hint}")
    notes: list[str] = []
    curve, dead = _Reader(), _Reader()
    if (folder / "metrics.jsonl").is_file():
        curve.read(folder / "metrics.jsonl", notes)
    else:
        notes.append("metrics.jsonl is missing: there is no step and no event to show")
    for path in sorted((folder / "segments").glob("metrics_*.jsonl"), key=lambda p: (len(p.name), p.name)):
        dead.read(path, notes)
    steps = _in_order(curve.steps(), notes)
    return Record(
        folder,
        label,
        steps,
        tuple(curve.events),
        dead.steps(),
        tuple(dead.events),
        run=_mapping(folder / "run.json", json.loads, notes),
        config=_mapping(folder / "config.yaml", _yaml, notes),
        ds_config=_mapping(folder / "ds_config.json", json.loads, notes),
        env=_mapping(folder / "env.json", json.loads, notes),
        notes=tuple(notes),
        read_at=time.time(),
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p) for p in parts]


def finite(row: dict, key: str) -> float | None:
    """A number of a row; None where there is none or it is not finite."""
    return _real(row.get(key))


def _real(value: object) -> float | None:
    return float(value) if type(value) in (int, float) and -_LARGEST < value < _LARGEST else None


def mapping(value: object) -> dict:
    """The value where it is a mapping, an empty one where it is anything else."""
    return value if isinstance(value, dict) else {}


def flat(config: dict) -> dict[str, Any]:
    """Dotted keys of all that is nested in mappings; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[str(key)] = value
    return found


class _Reader:
    """Sorts the lines of metrics files into columns and events. Columns hold days of rows where dicts would not."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self._columns: dict[str, array] = {}
        self._stages: list[tuple[float, str]] = []
        self._layers: list[tuple[float, dict[str, list[float]]]] = []
        self._count = 0

    def read(self, path: Path, notes: list[str]) -> None:
        broken = 0
        try:
            for row in _rows(path):
                if row is None:
                    broken += 1
                elif isinstance(row.get("event"), str):
                    self.events.append(row)
                elif finite(row, "step") is not None and "loss" in row:
                    self._add(row)
                else:
                    broken += 1
        except OSError as err:
            notes.append(f"{path.name} cannot be read: {err.strerror}")
        if broken:
            notes.append(f"{path.name}: {broken} line(s) are torn or no rows, and left out")

    def _add(self, row: dict) -> None:
        for name, value in row.items():
            if (real := _real(value)) is not None:
                column = self._columns.setdefault(name, array("d"))
                column.extend([math.nan] * (self._count - len(column)))
                column.append(real)
        self._count += 1
        stage = row.get("stage")
        if isinstance(stage, str) and (not self._stages or self._stages[-1][1] != stage):
            self._stages.append((row["step"], stage))
        if layers := _layers(row):
            self._layers.append((row["step"], layers))

    def steps(self) -> Steps:
        for column in self._columns.values():
            column.extend([math.nan] * (self._count - len(column)))
        columns = {name: np.frombuffer(column, np.float64) for name, column in self._columns.items() if len(column)}
        return Steps(columns, tuple(self._stages), tuple(self._layers))


def _rows(path: Path) -> Iterator[dict | None]:
    """The file's lines as rows; None for a line that is none. Blank lines are passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip("\x00 \t\r\n"):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _layers(row: dict) -> dict[str, list[float]]:
    found = mapping(row.get("layers"))
    return {
        str(name): [math.nan if (real := _real(value)) is None else real for value in values]
        for name, values in found.items()
        if isinstance(values, list) and values
    }


def _in_order(steps: Steps, notes: list[str]) -> Steps:
    """Each step once, in order: of rows with the same step the last one counts."""
    number = steps.of("step")
    if not (np.diff(number) <= 0).any():
        return steps
    _, from_end = np.unique(number[::-1], return_index=True)
    keep = len(number) - 1 - from_end
    notes.append(f"metrics.jsonl: {len(number) - len(keep)} row(s) repeat a step; the last of each is shown")
    layers = sorted(dict(steps.layers).items())
    return Steps({name: column[keep] for name, column in steps.columns.items()}, steps.stages, tuple(layers))


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ValueError("not yaml") from err


def _mapping(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is missing or cannot be read")
    return {}
