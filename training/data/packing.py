"""Packs documents into windows of max_seq_len tokens by best fit, so that few are cut and there is little padding.

The table of a shard's windows is cached beside the dataset. It is a pure function of the shard's document ends and the
window length, so any rank may write it. One that is damaged, or does not cover the shard exactly, is made again.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import io
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from gsa.files import read_small_file, write_atomically
from training.data.manifest import parse_npy

VERSION = 1
"""Raise it when the result of `pack` changes: the order of the data is a contract."""
_OVERHEAD_BYTES = 1 << 14
"""The most that a cache file holds besides its arrays, which have at most 40 bytes per span."""


@dataclass(frozen=True)
class Windows:
    """The windows of one shard. Window w holds the spans first[w] to first[w + 1] - 1; a span is a run of tokens.

    start, length: int64 (spans,), the position of a span in the shard, in tokens.
    whole: bool (spans,), whether the span reaches its document's end, so that its last token has no target.
    first: int64 (windows + 1,). targets: int64 (windows,), tokens with a target.
    """

    start: np.ndarray
    length: np.ndarray
    whole: np.ndarray
    first: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(ends: np.ndarray, window_tokens: int) -> Windows:
    """Best-fit decreasing: span by span, the longest first, each goes where it leaves the least room.

    ends: int64 (documents,), exclusive ends of a shard's documents. A document longer than a window is cut into spans
    that fill a window each, and a rest. Ties are broken by the position in the shard, so the result is a pure function.
    """
    begins = np.concatenate([[0], ends[:-1]])
    lengths = ends - begins
    full = lengths // window_tokens
    rest = lengths - full * window_tokens
    # whole windows first, in shard order
    document = np.repeat(np.arange(len(ends)), full)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)
    starts = [begins[document] + nth * window_tokens]
    sizes = [np.full(len(document), window_tokens, dtype=np.int64)]
    bins = [np.arange(len(document))]

    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]
    starts.append(begins[left] + full[left] * window_tokens)
    sizes.append(rest[left])
    bins.append(len(document) + _best_fit(rest[left].tolist(), window_tokens))

    start, length, window = (np.concatenate(parts).astype(np.int64) for parts in (starts, sizes, bins))
    order = np.argsort(window, kind="stable")
    start, length, window = start[order], length[order], window[order]
    count = int(window[-1]) + 1 if len(window) else 0
    first = np.searchsorted(window, np.arange(count + 1))
    whole = np.isin(start + length, ends)
    targets = np.add.reduceat(length - whole, first[:-1]) if count else np.zeros(0, np.int64)
    return Windows(start, length, whole, first, targets)


def _best_fit(sizes: list[int], capacity: int) -> np.ndarray:
    """The bin number of each size. sizes: in descending order. Of bins with the same room, the oldest is used first."""
    rooms: list[int] = []  # distinct rooms of open bins, ascending
    by_room: dict[int, list[int]] = {}  # room -> bins, oldest last
    placed = np.empty(len(sizes), dtype=np.int64)
    bins = 0
    for i, size in enumerate(sizes):
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            bin_number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, bin_number = capacity, bins
            bins += 1
        placed[i] = bin_number
        if room > size:
            if room - size not in by_room:
                bisect.insort(rooms, room - size)
                by_room[room - size] = []
            by_room[room - size].append(bin_number)
    return placed


def cached_windows(shard: Path, ends: np.ndarray, ends_sha256: str, window_tokens: int) -> Windows:
    """The result of `pack`, read from the cache beside the dataset, or computed and written there.

    When the dataset's folder cannot be written, a note is printed and the table exists in memory only.
    """
    folder = shard.parent.parent / "packed"
    path = folder / f"{shard.parent.name}_{shard.stem}_{window_tokens}_v{VERSION}_{ends_sha256[:16]}.npz"
    cached = _read(path, ends, window_tokens)
    if cached is not None:
        return cached
    windows = pack(ends, window_tokens)
    body = io.BytesIO()
    np.savez(body, **vars(windows))
    digest = hashlib.sha256(body.getvalue()).digest()
    try:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():  # a dataset from elsewhere decides nothing outside its folder
            raise OSError(errno.ELOOP, "it is a link")
        with write_atomically(path, durable=False, unique=True) as file:  # every rank may write it
            file.write(digest + body.getvalue())
    except OSError as err:
        print(f"note: window table {path.name} stays in memory: {err.strerror} ({folder})", file=sys.stderr)
    return windows


def _read(path: Path, ends: np.ndarray, window_tokens: int) -> Windows | None:
    """The cached table, or None when there is none or it is not one of this shard."""
    spans = len(ends) + int(ends[-1]) // window_tokens
    try:
        raw = read_small_file(path, 40 * spans + _OVERHEAD_BYTES)
    except FileNotFoundError:
        return None
    except OSError:
        raw = b""
    try:
        windows = _parse(raw, ends, window_tokens)
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        windows = None
    if windows is None:
        print(f"note: {path} is damaged; making it again", file=sys.stderr)
    return windows


def _parse(raw: bytes, ends: np.ndarray, window_tokens: int) -> Windows | None:
    """The table in the content of a cache file; None when it would read other tokens than those of the shard."""
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        return None
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(raw[32:])) as archive:
        for name in (field.name for field in fields(Windows)):
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:  # nothing may grow while it is read
                return None
            arrays[name] = parse_npy(archive.read(entry), np.dtype(bool if name == "whole" else np.int64))
    windows = Windows(**arrays)
    return windows if _covers(windows, ends, window_tokens) else None


def _covers(w: Windows, ends: np.ndarray, window_tokens: int) -> bool:
    """Whether the spans are every token of the shard once, in windows of at most this length, with true targets."""
    spans = len(w.start)
    if not len(w.length) == len(w.whole) == spans or not spans or len(w.first) != len(w.targets) + 1:
        return False
    if w.first[0] != 0 or w.first[-1] != spans or (np.diff(w.first) < 1).any() or (w.length < 1).any():
        return False
    order = np.argsort(w.start)
    follows = np.concatenate([w.start[order][1:], ends[-1:]])
    if w.start[order[0]] != 0 or not np.array_equal(w.start[order] + w.length[order], follows):
        return False
    return (
        np.array_equal(w.whole, np.isin(w.start + w.length, ends))
        and np.array_equal(w.targets, np.add.reduceat(w.length - w.whole, w.first[:-1]))
        and np.add.reduceat(w.length, w.first[:-1]).max() <= window_tokens
    )
