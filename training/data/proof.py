"""Proves that the bytes that a run trains on are the bytes that were prepared, without torch.

A dataset's small files are compared with their sha256 whenever it is opened (manifest.py), and so is a split of up to
AT_ONCE_BYTES. Shards of a larger split are read by a thread during the first steps: `BackgroundProof`. A shard that was
found good is remembered by its inode, size, times of change and sha256 in `packed/verified_*.json`, so that the next
start need not read it. Where the folder cannot be written, nothing is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gsa.files import open_regular, read_small_file, write_atomically
from gsa.units import MIB, size_text
from training.data.manifest import (
    NOT_AS_PREPARED,
    SPLITS,
    TABLES,
    TOKENIZER,
    DataError,
    Shard,
    how_to_mend,
    read_ends,
    read_manifest,
    read_tables,
    read_tokenizer,
    require_size,
    shards_of,
    unverifiable,
)

AT_ONCE_BYTES = 128 * MIB
"""A split of up to this size is read in full when it is opened: a second at most."""
_BLOCK_BYTES = 4 * MIB
_MAX_MEMORY_BYTES = 16 * MIB
_LOWEST_PRIORITY = 19


class Remembered:
    """The shards of one dataset that were found good before, by an earlier process or by another rank."""

    def __init__(self, folder: Path) -> None:
        self._cache = folder / "packed"
        self._good: set[tuple] = set()
        for path in self._cache.glob("verified_*.json"):
            with suppress(OSError, ValueError, RecursionError, TypeError):  # only a cache
                self._good |= {tuple(entry) for entry in json.loads(read_small_file(path, _MAX_MEMORY_BYTES))}
        self._new = False

    def has(self, shard: Shard) -> bool:
        return _stamp(shard) in self._good

    def add(self, stamp: tuple) -> None:
        self._good = {entry for entry in self._good if entry[0] != stamp[0]} | {stamp}
        self._new = True

    def save(self, writer: str = "at_start") -> None:
        """Writes what was added. writer: a name of its own for each process that may save at the same time."""
        if not self._new or self._cache.is_symlink():
            return
        with suppress(OSError):
            self._cache.mkdir(exist_ok=True)
            with write_atomically(self._cache / f"verified_{writer}.json", durable=False, unique=True) as file:
                file.write(json.dumps(sorted(self._good, key=str), indent=0).encode())
            self._new = False


def prove_shards(shards: Iterable[Shard], memory: Remembered, go_on: Callable[[], bool] = lambda: True) -> None:
    """Reads every shard that is not remembered and remembers it. All shards are of one dataset.

    go_on: asked before every block; once it answers False, nothing more is read. Raises DataError, naming the file,
    for bytes that are not those of the manifest and for an id outside the vocabulary.
    """
    for shard in shards:
        if memory.has(shard):
            continue
        stamp = _stamp(shard)
        if not prove_shard(shard, go_on):
            return
        if stamp is not None and stamp == _stamp(shard):
            memory.add(stamp)


def prove_shard(shard: Shard, go_on: Callable[[], bool] = lambda: True) -> bool:
    """Reads a shard, remembered or not; False when `go_on` answered False before its end. Raises DataError as above."""
    sha, largest = hashlib.sha256(), -1
    try:
        with open(open_regular(shard.path), "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                if not go_on():
                    return False
                sha.update(block)
                ids = np.frombuffer(block, shard.dtype, len(block) // shard.dtype.itemsize)
                largest = max(largest, int(ids.max(initial=0)))
    except OSError as err:
        raise DataError(f"{shard.path} cannot be read: {err.strerror}; {how_to_mend(shard.folder)}") from err
    if sha.hexdigest() != shard.sha256:
        raise DataError(f"{shard.path}: {NOT_AS_PREPARED}; {how_to_mend(shard.folder)}")
    if largest >= shard.vocab_size:
        raise DataError(
            f"{shard.path} holds the id {largest}, outside the vocabulary of {shard.vocab_size}; "
            f"{how_to_mend(shard.folder)}"
        )
    return True


def _stamp(shard: Shard) -> tuple | None:
    """What identifies the content of a shard without reading it; None when there is no such file."""
    try:
        info = os.stat(shard.path)
    except OSError:
        return None
    name = shard.path.relative_to(shard.folder).as_posix()
    return (name, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, shard.sha256, shard.vocab_size)


class BackgroundProof:
    """Reads shards in a thread of low priority while the run trains; leaving the context ends it.

    shards: those that nobody has read since they were last changed. part, parts: the processes of a node share the
    work, each reads every `parts`-th shard. failed: called once, with the message, when a shard is not good.
    `left` is the number of shards that this process has still to read.
    """

    def __init__(
        self, shards: Sequence[Shard], *, failed: Callable[[str], None], part: int = 0, parts: int = 1
    ) -> None:
        self._shards, self._failed, self._writer = shards[part::parts], failed, f"{part}_of_{parts}"
        self.left = len(self._shards)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prove, name="data check", daemon=True)

    def __enter__(self) -> BackgroundProof:
        if self._shards:
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self._shards:
            self._thread.join()
        if self.left and not any(error):
            print(
                f"note: {self.left} shards were not read to their end by this process, so changes in them would not "
                f"be noticed; the next launch reads them, and so does python -m training.verify "
                f"{self._shards[-1].folder}",
                flush=True,
            )

    def _prove(self) -> None:
        with suppress(OSError):  # of this thread only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        memories = {folder: Remembered(folder) for folder in {shard.folder for shard in self._shards}}
        try:
            for shard in self._shards:
                prove_shards([shard], memories[shard.folder], lambda: not self._stop.is_set())
                if self._stop.is_set():
                    break
                self.left -= 1
        except DataError as err:
            self._failed(f"{err}. Steps of this launch may have trained on it: resume from a checkpoint made before")
        for memory in memories.values():
            memory.save(self._writer)


# -- the proof of a whole dataset --------------------------------------------------------------------------


def verify_dataset(folder: Path, *, report: Callable[[str], None] = print) -> bool:
    """Reads every byte of a dataset, reports line by line, and returns whether all is as it was prepared."""
    report(f"{folder}")
    try:
        prove_dataset(folder, report=report)
    except DataError as err:
        report(f"✗ {err}")
        return False
    report("✓ The dataset is as it was prepared")
    return True


def prove_dataset(folder: Path, *, report: Callable[[str], None] = lambda text: None) -> None:
    """Reads every byte of a dataset and reports what it proved, line by line.

    Raises DataError for the first file that is not as it was prepared, and for contents that contradict each other.
    """
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    tables = read_tables(folder, manifest)
    known = [TOKENIZER] * (tokenizer is not None) + [
        name for name in TABLES if not any(name in line for line in unverifiable(folder, manifest))
    ]
    report(f"  manifest, {', '.join(known)}: as prepared")
    for line in unverifiable(folder, manifest):
        report(f"  warning: {line}")
    if tokenizer is None:
        report(f"  warning: {folder / TOKENIZER} is missing: the text can be trained on, but not shown")
    else:
        require_bytes_of_tokenizer(folder, tokenizer, tables["token_bytes.npy"])
    counts = np.zeros(manifest["vocab_size"], dtype=np.int64)
    for split in SPLITS:
        shards = shards_of(folder, manifest, split)
        for shard in shards:
            require_size(shard)
            ends = read_ends(shard)
            prove_shard(shard)
            _require_ends(shard, ends, manifest["eod_id"])
            if split == "train":
                counts += _counts(shard)
        report(f"  {split}: {len(shards)} shards, {size_text(sum(s.bytes for s in shards))}, every sha256 and id right")
    if not np.array_equal(counts, tables["token_counts.npy"]):
        raise DataError(f"{folder / 'token_counts.npy'} does not count the training text; {how_to_mend(folder)}")


def require_bytes_of_tokenizer(folder: Path, tokenizer: bytes, token_bytes: np.ndarray) -> None:
    """Raises DataError unless token_bytes.npy holds the bytes behind each id of the dataset's tokenizer.

    tokenizer: the content of tokenizer.json. Only a byte-level tokenizer spells out its bytes, so others are not
    compared.
    """
    from tokenizers import Tokenizer

    from training.data import tokenizer as bpe  # it reads text, which an opened dataset need not

    try:
        loaded = Tokenizer.from_buffer(tokenizer)
    except Exception:  # the library raises bare Exception; a tokenizer that cannot be loaded has no bytes to compare
        return
    # before any table is allocated: a forged tokenizer may give an entry any number
    entries, true = bpe.vocab_size(loaded), len(token_bytes)
    if entries > true or (bpe.is_byte_level(loaded) and entries < true):
        raise DataError(f"{folder / TOKENIZER} has {entries} entries, the dataset {true}; {how_to_mend(folder)}")
    if bpe.is_byte_level(loaded) and not np.array_equal(bpe.token_bytes(loaded), token_bytes):
        raise DataError(
            f"{folder / 'token_bytes.npy'} is not of {folder / TOKENIZER}, so bits per byte would be wrong; "
            f"{how_to_mend(folder)}"
        )


def _require_ends(shard: Shard, ends: np.ndarray, eod_id: int) -> None:
    if shard.tokens and not (np.memmap(shard.path, shard.dtype, mode="r")[ends - 1] == eod_id).all():
        raise DataError(
            f"{shard.path} holds a document that does not end with eod_id={eod_id}; {how_to_mend(shard.folder)}"
        )


def _counts(shard: Shard) -> np.ndarray:
    counts = np.zeros(shard.vocab_size, dtype=np.int64)
    step = _BLOCK_BYTES // shard.dtype.itemsize
    tokens = np.memmap(shard.path, shard.dtype, mode="r") if shard.tokens else np.zeros(0, shard.dtype)
    for begin in range(0, len(tokens), step):
        counts += np.bincount(tokens[begin : begin + step], minlength=shard.vocab_size)
    return counts
