"""What a run says of itself: metric names with units, and metrics.jsonl.

metrics.jsonl is the truth of a run: one JSON object per line, one row per optimizer step and one per
event. A step row has "step" and "loss"; an event row has "event", and never "loss". After a resume at
step N the file reads as one curve: rows of steps after N, which the resumed run trains again, are moved
to segments/metrics_<k>.jsonl first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gsa.checkpoint import manifest


def as_written(value: object) -> Any:
    """A row, or a part of one, as metrics.jsonl has it: JSON has no number for what is not finite, so it is a word."""
    if isinstance(value, dict):
        return {key: as_written(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends rows to metrics.jsonl; every row is on disk (flushed) when `write` returns. Rank 0 only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO = open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Adds one row. Non-finite numbers are written as strings, since JSON has none.

        CheckpointError when the disk refuses.
        """
        with manifest.writing(self._path):
            self._file.write(json.dumps(as_written(row), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class DamagedRowsError(manifest.CheckpointError):
    """A line inside a metrics file is no row; the message says which, and what to do. Refused as damaged state is."""


def iter_rows(path: Path) -> Iterator[dict]:
    """All whole rows of a metrics file, one at a time: days of a run hardly fit into memory as dicts.

    A torn last line, left by a kill, is passed over. DamagedRowsError for any other line that is no row.
    """
    return (row for _, row in _placed_rows(path))


def read_rows(path: Path) -> list[dict]:
    """`iter_rows`, all of them."""
    return list(iter_rows(path))


def _placed_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows, each with the offset in bytes at which the next line begins."""
    if not path.exists():
        return
    end, wrong = 0, None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if wrong is not None:
                raise wrong
            end += len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as err:
                what = f"not JSON ({getattr(err, 'msg', err)})"
                wrong = DamagedRowsError(f"{path}, line {number}: {what}; restore the file or delete the line")
                continue
            yield end, row


def require_rows(path: Path) -> None:
    """DamagedRowsError when a line inside it is no row."""
    for _ in iter_rows(path):
        pass


def rewind(path: Path, step: int) -> list[dict]:
    """Makes metrics.jsonl end at `step`; rows after it go to segments/metrics_<k>.jsonl beside it.

    Rows are in time order, so everything after the last row that belongs to a step <= `step` moves,
    events too; but a save is told when it is published, steps later, and stays with its step. A torn last
    line is dropped. Returns the rows that moved. Atomic: the segment is written
    first, then the shortened file replaces the old one.
    """
    kept, late, moved = 0, [], []  # bytes of the head; rows of the rest
    for end, row in _placed_rows(path):
        if moved or ("loss" in row and row["step"] > step):
            (late if row.get("event") == "save" and row["step"] <= step else moved).append(row)
        else:
            kept = end
    if moved:
        segments = path.parent / "segments"
        segments.mkdir(exist_ok=True)
        number = len(list(segments.glob("metrics_*.jsonl")))
        _replace(segments / f"metrics_{number}.jsonl", moved)
        _replace(path, late, head=kept)
    elif path.exists():
        with open(path, "r+b") as file:
            file.truncate(kept)  # a torn last line
            file.seek(max(0, kept - 1))
            if file.read(1) not in (b"\n", b""):  # whole, but for its end
                file.write(b"\n")
    return moved


def _replace(path: Path, rows: list[dict], head: int = 0) -> None:
    """Atomically: the first `head` bytes of what was there, and rows."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if head:
            with open(path, "rb") as before:
                while head and (part := before.read(min(head, 1 << 20))):
                    file.write(part)
                    head -= len(part)
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
