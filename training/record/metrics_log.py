"""Writing, reading and rewinding metrics.jsonl, the record of a run that everything else is derived from.

One JSON object per line: one row per optimizer step and one per event. A step row has "step" and "loss"; an event row
has "event", and never "loss". The file always reads as one curve: when a launch resumes at step N, the rows of later
steps, which are trained again, are moved to segments/metrics_<k>.jsonl first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from gsa.checkpoint import manifest
from gsa.files import open_regular, write_atomically
from gsa.units import MIB

BLOCK = 64 * 1024
"""Bytes that are read at a time where a file is read from its end."""


def as_written(value: object) -> Any:
    """A row, or a part of one, as metrics.jsonl holds it: non-finite numbers are strings, since JSON has none."""
    if isinstance(value, dict):
        return {key: as_written(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends rows to metrics.jsonl; a row has left this process when `write` returns. Rank 0 only.

    A disk that refuses a row ends no run: the row is kept in memory and written with the next one. warn: called when
    that begins, when it ends, and at the end with the number of rows that are lost.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._file: FileIO = open(path, "ab", buffering=0)
        self._end = self._file.tell()
        self._kept: list[bytes] = []
        self._refused = False

    def write(self, row: dict) -> None:
        """Appends one row, as `as_written` makes it, after those that the disk has refused so far."""
        self._kept.append(json.dumps(as_written(row), allow_nan=False).encode() + b"\n")
        try:
            while self._kept:
                self._append(self._kept[0])
                del self._kept[0]
        except OSError as err:
            if not self._refused:
                self._warn(f"{self._path} could not be written ({err.strerror}); rows are kept until it can")
            self._refused = True
        else:
            if self._refused:
                self._warn(f"{self._path} can be written again; no row is lost")
            self._refused = False

    def _append(self, line: bytes) -> None:
        """Writes the line whole or, when the disk refuses, nothing of it."""
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        if self._kept:
            self._warn(f"{self._path}: its last {len(self._kept)} rows are lost, since the disk refused them")
        with suppress(OSError):  # a quota may be reported only now
            self._file.close()


class DamagedRowsError(manifest.CheckpointError):
    """A line inside a metrics file is not a row; the message names the line and says what to do."""


def iter_rows(path: Path) -> Iterator[dict]:
    """All complete rows of a metrics file, one at a time: the rows of a run of days may not fit into memory.

    A torn last line, left by a kill, is skipped; a file that does not exist has no rows. Raises DamagedRowsError at any
    other line that is not a JSON object.
    """
    return _rows_from(path, 0)


def read_rows(path: Path) -> list[dict]:
    """All rows of `iter_rows` as a list."""
    return list(iter_rows(path))


def rows_from_end(path: Path) -> Iterator[dict]:
    """The rows of `iter_rows`, the last one first. Reads no more of the file than the rows that are taken."""
    return (row for _, row in _ends_and_rows_from_end(path))


def rows_after(path: Path, step: int) -> Iterator[dict]:
    """The rows that follow the row of `step`, in the order of the file. Reads no earlier part of the file."""
    return _rows_from(path, _end_of_step(path, step) if step > 0 else 0)


def require_rows(path: Path) -> None:
    """Raises DamagedRowsError when a line inside the file is not a row."""
    for _ in iter_rows(path):
        pass


def _rows_from(path: Path, start: int) -> Iterator[dict]:
    """The rows of the lines that begin at the offset `start` or later."""
    if not path.exists():
        return
    begin, error = start, None
    with _opened(path) as file:
        file.seek(start)
        for line in file:
            if error is not None:  # the line before was not the last one, so it was not merely torn
                raise _damaged(path, begin, error)
            try:
                yield _parse(line)
            except ValueError as err:
                error = err
                continue
            begin += len(line)


def _ends_and_rows_from_end(path: Path) -> Iterator[tuple[int, dict]]:
    """(offset in bytes at which the next line begins, row) of each row, the last one first."""
    if not path.exists():
        return
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        for begin, line in _lines_from_end(file, size):
            end = begin + len(line)
            try:
                row = _parse(line)
            except ValueError as err:
                if end == size:  # torn by a kill
                    continue
                raise _damaged(path, begin, err) from None
            yield end, row


def _lines_from_end(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset in bytes at which it begins, line with its line break) of each line, the last one first."""
    begin, rest = size, b""  # rest: the bytes from `begin` on that belong to a line that begins earlier
    while begin:
        length = min(BLOCK, begin)
        begin -= length
        file.seek(begin)
        block = file.read(length) + rest
        end = len(block)
        while (line_break := block.rfind(b"\n", 0, end - 1)) >= 0:
            yield begin + line_break + 1, block[line_break + 1 : end]
            end = line_break + 1
        rest = block[:end]
    if rest:
        yield 0, rest


def _parse(line: bytes) -> dict:
    """Raises ValueError when the line is not a JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row


def _opened(path: Path) -> BinaryIO:
    """The file for reading. Raises CheckpointError, without waiting, when it is a pipe, a device or cannot be read."""
    try:
        return open(open_regular(path), "rb")
    except OSError as err:
        raise manifest.CheckpointError(f"{path}: cannot be read: {err.strerror}; restore it from a copy") from err


def _damaged(path: Path, begin: int, err: ValueError) -> DamagedRowsError:
    """The error for the line that begins at the offset `begin`."""
    with _opened(path) as file:
        number = 1 + sum(part.count(b"\n") for part in _parts(file, begin))
    what = f"not JSON ({getattr(err, 'msg', err)})"
    return DamagedRowsError(f"{path}, line {number}: {what}; restore the file or delete the line")


def _end_of_step(path: Path, step: int) -> int:
    """The offset behind the last row of a step up to `step`; 0 when there is none."""
    return next((end for end, row in _ends_and_rows_from_end(path) if _is_step(row) and row["step"] <= step), 0)


def _is_step(row: dict) -> bool:
    return "loss" in row


def rewind(path: Path, step: int) -> list[dict]:
    """Makes metrics.jsonl end at `step`: moves the rows after it to segments/metrics_<k>.jsonl and returns them.

    Rows are in order of time: from the first row of a later step on, all rows move, events too. The one exception is
    the "save" event of a step <= `step`: it is written when the save is published, some steps later, and stays. A torn
    last line is dropped. A kill at any moment loses no row: the moved rows are written to disk first, then the
    shortened file replaces the old one in one step.
    """
    tail, head = (
        [],
        0,
    )  # tail: (end, row) of the rows after that of `step`; head: bytes of the file that stay as they are
    for end, row in _ends_and_rows_from_end(path):
        if _is_step(row) and row["step"] <= step:
            head = end
            break
        tail.append((end, row))
    late_saves, moved = [], []
    for end, row in reversed(tail):
        if moved or _is_step(row):
            (late_saves if row.get("event") == "save" and row["step"] <= step else moved).append(row)
        else:
            head = end
    if moved:
        segments = path.parent / "segments"
        segments.mkdir(exist_ok=True)
        number = len(list(segments.glob("metrics_*.jsonl")))
        with write_atomically(segments / f"metrics_{number}.jsonl", durable=True) as file:
            file.write(_lines(moved))
        with open(path, "rb") as before, write_atomically(path, durable=True) as file:
            for part in _parts(before, head):
                file.write(part)
            file.write(_lines(late_saves))
    elif path.exists():
        with open(path, "r+b") as file:
            file.truncate(head)  # drops a torn last line
            file.seek(max(0, head - 1))
            if file.read(1) not in (b"\n", b""):  # the last row is complete but for its line break
                file.write(b"\n")
    return moved


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parts(source: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, a MiB at a time."""
    while size and (part := source.read(min(size, MIB))):
        size -= len(part)
        yield part
