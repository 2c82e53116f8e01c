"""Prepared datasets as batches of packed windows. A batch is a pure function of the seed and the sample numbers.

A sample number is the position of a window in the training order, counted over all epochs. Source: docs/data.md for
the files and the order, docs/gsa.md, sections 2 and 7, for doc_start and targets.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gsa.files import open_regular
from training.data import packing
from training.data.manifest import (
    FORMAT,
    MANIFEST_KEYS,
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
from training.data.order import BLOCK, Order
from training.data.proof import AT_ONCE_BYTES, Remembered, prove_shard, prove_shards, require_bytes_of_tokenizer

__all__ = ["FORMAT", "IGNORE", "MANIFEST_KEYS", "Batch", "DataError", "PackedTokens", "read_manifest"]

IGNORE = -100
OPEN_SHARDS = 256
"""Shards of one split that are open at a time: a process has about 1000 file descriptors."""


@dataclass(frozen=True)
class Batch:
    """tokens, targets, doc_start: (B, T) int64. A target is the next token of the same document, or -100."""

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_start: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(*(x.to(device, non_blocking=non_blocking) for x in (self.tokens, self.targets, self.doc_start)))

    def pin_memory(self) -> Batch:
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), self.doc_start.pin_memory())


class _OpenShard:
    """A shard that is open for reading by position.

    It is read, not mapped into memory: a map whose file is cut off or whose disk fails kills the process with SIGBUS.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._descriptor = open_regular(shard.path)
        self.inode = os.fstat(self._descriptor).st_ino

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) ids from position `start` on. Raises OSError, or DataError when the file ends before."""
        dtype = self._shard.dtype
        raw = os.pread(self._descriptor, count * dtype.itemsize, start * dtype.itemsize)
        if len(raw) < count * dtype.itemsize:
            raise DataError(
                f"{self._shard.path} was cut off while it was being read; {how_to_mend(self._shard.folder)}"
            )
        return np.frombuffer(raw, dtype)


def _open_same(shards: Sequence[Shard], inodes: Sequence[int], number: int) -> _OpenShard:
    """Opens a shard, which must be the file that it was at the start. Raises OSError, DataError."""
    found = _OpenShard(shards[number])
    if found.inode != inodes[number]:
        raise DataError(f"{shards[number].path} was replaced while it was being read; start again")
    return found


class _Split:
    """One split of one prepared dataset. unproved: shards whose bytes were not yet compared with their sha256."""

    def __init__(self, folder: Path, split: str, window_tokens: int) -> None:
        self.folder, self.split = folder, split
        self.manifest = read_manifest(folder)
        self.tokenizer = read_tokenizer(folder, self.manifest)
        self.tables = read_tables(folder, self.manifest)
        self.shards: list[Shard] = []
        self._windows: list[packing.Windows] = []
        for shard in shards_of(folder, self.manifest, split):
            require_size(shard)
            ends = read_ends(shard)
            if shard.tokens:
                self.shards.append(shard)
                self._windows.append(packing.cached_windows(shard.path, ends, shard.ends_sha256, window_tokens))
        self.unproved = self._prove_if_small()
        self.first_window = np.cumsum([0, *(len(windows) for windows in self._windows)])
        self.n_windows = int(self.first_window[-1])
        if not self.n_windows:
            raise DataError(f"{folder}: its {split} split holds no text; prepare it again with more documents")
        self.targets = np.concatenate([windows.targets for windows in self._windows])
        inodes = [shard.path.stat().st_ino for shard in self.shards]
        self._open = lru_cache(OPEN_SHARDS)(partial(_open_same, self.shards, inodes))

    def _prove_if_small(self) -> list[Shard]:
        memory = Remembered(self.folder)
        unproved = [shard for shard in self.shards if not memory.has(shard)]
        if sum(shard.bytes for shard in unproved) > AT_ONCE_BYTES:
            return unproved
        prove_shards(unproved, memory)
        memory.save()
        return []

    def fill(self, window: int, tokens: np.ndarray, targets: np.ndarray, doc_start: np.ndarray) -> None:
        """Writes one window into rows of length T that hold padding.

        Raises DataError, naming the shard, when it cannot be read or holds an id outside the vocabulary.
        """
        at = int(np.searchsorted(self.first_window, window, side="right")) - 1
        w, shard = self._windows[at], self.shards[at]
        local = window - int(self.first_window[at])
        position = 0
        for span in range(w.first[local], w.first[local + 1]):
            start, length, whole = int(w.start[span]), int(w.length[span]), bool(w.whole[span])
            predicted = length - whole
            try:
                ids = self._open(at).read(start, 1 + predicted)
            except OSError as err:
                reason = "too many files are open" if err.errno == errno.EMFILE else err.strerror
                raise DataError(f"{shard.path} cannot be read: {reason}; {how_to_mend(self.folder)}") from err
            if ids.max() >= shard.vocab_size:
                raise DataError(
                    f"{shard.path} holds the id {ids.max()}, outside the vocabulary of {shard.vocab_size}; "
                    f"{how_to_mend(self.folder)}"
                )
            here = slice(position, position + length)
            tokens[here] = ids[:length]
            targets[position : position + predicted] = ids[1:]
            doc_start[here] = position
            position += length


class PackedTokens:
    """One split of one or several prepared datasets, as packed windows in a seeded order.

    sources: folder -> weight. It opens memory maps; it holds the window tables and no text. `fingerprint` identifies
    the text and its mixture; together with seed and max_seq_len it decides every batch. Raises DataError when a dataset
    is missing, incomplete, of another format or size, or made with another tokenizer than the first.
    """

    def __init__(self, sources: Mapping[str, float], *, split: str, max_seq_len: int, seed: int) -> None:
        self.sources, self.split, self.max_seq_len = dict(sources), split, max_seq_len
        for folder, weight in self.sources.items():
            if not 0 < weight < math.inf:
                raise DataError(f"data.mixture: weight {weight} of {folder} must be above 0 and finite")
        for folder, weight in self.sources.items():
            if weight < sum(self.sources.values()) / BLOCK:
                raise DataError(
                    f"data.mixture: weight {weight} of {folder} is below 1/{BLOCK} of the sum, and shares are exact in "
                    f"every {BLOCK} windows; raise it or leave it out"
                )
        self._splits = [_Split(Path(folder), split, max_seq_len) for folder in self.sources]
        manifests = [source.manifest for source in self._splits]
        for folder, manifest in zip(self.sources, manifests, strict=True):
            if any(manifest[key] != manifests[0][key] for key in ("tokenizer_sha256", "vocab_size", "eod_id")):
                raise DataError(
                    f"{folder} and {next(iter(self.sources))} were made with different tokenizers; prepare one "
                    f"again with --tokenizer of the other"
                )
        self.vocab_size: int = manifests[0]["vocab_size"]
        self.eod_id: int = manifests[0]["eod_id"]
        self.tokenizer_sha256: str = manifests[0]["tokenizer_sha256"]
        self.tokenizer = next((source.tokenizer for source in self._splits if source.tokenizer is not None), None)
        self.n_windows = sum(source.n_windows for source in self._splits)
        self.token_bytes: np.ndarray = self._splits[0].tables["token_bytes.npy"]
        self.token_counts: np.ndarray = sum(source.tables["token_counts.npy"] for source in self._splits)
        self.unproved: list[Shard] = [shard for source in self._splits for shard in source.unproved]
        self.fault: str | None = None
        self._order = Order([source.n_windows for source in self._splits], list(self.sources.values()), seed)
        self.fingerprint: str = text_fingerprint(manifests, self._order.parts, split)

    def batch(self, samples: np.ndarray) -> Batch:
        """The windows at the given positions of the training order. samples: (B,) int64, sample numbers."""
        place = self._order(samples)
        B, T = len(place.window), self.max_seq_len
        tokens = np.full((B, T), self.eod_id, dtype=np.int64)
        targets = np.full((B, T), IGNORE, dtype=np.int64)
        # a padding position is a document of its own: no other position attends to it, and it attends to no other
        doc_start = np.tile(np.arange(T), (B, 1))
        for row in range(B):
            self._splits[place.source[row]].fill(int(place.window[row]), tokens[row], targets[row], doc_start[row])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(doc_start))

    def distinct(self, n_windows: int) -> np.ndarray:
        """Sample numbers of the first `n_windows` windows of the order without repetitions; 0: of every window once.

        In a mixture the order repeats a source with few windows before another one's have all occurred. A dataset that
        the mixture names twice, as two folders, is taken once. Returns int64, ascending.
        """
        texts = [source.manifest["fingerprint"] for source in self._splits]
        sources = [number for number, text in enumerate(texts) if texts.index(text) == number]
        return self._order.first_pass(n_windows or self.n_windows, sources)

    def padding(self, count: int) -> Batch:
        """A batch of `count` windows without text, and so without targets."""
        tokens = torch.full((count, self.max_seq_len), self.eod_id, dtype=torch.int64)
        alone = torch.arange(self.max_seq_len).expand(count, -1).contiguous()
        return Batch(tokens, torch.full_like(tokens, IGNORE), alone)

    def n_targets(self, first: int, count: int) -> int:
        """The number of targets in the `count` windows from sample number `first` on. No text is read for it."""
        place = self._order(np.arange(first, first + count))
        return int(
            sum(
                source.targets[place.window[place.source == number]].sum() for number, source in enumerate(self._splits)
            )
        )

    def describe(self, samples: np.ndarray) -> list[str]:
        """The origin of each window, for messages: folder, pass, window. samples: (B,) int64, sample numbers."""
        place = self._order(samples)
        return [
            f"{self._splits[s].folder}/{self.split}, pass {e + 1}, window {w}"
            for s, e, w in zip(place.source, place.epoch, place.window, strict=True)
        ]

    @property
    def tokenizer_file(self) -> Path:
        """Where the tokenizer lies, for messages."""
        return Path(next(iter(self.sources))) / TOKENIZER

    def summary(self, *, planned: int) -> str:
        """One line about the text. planned: samples that the run will consume."""
        sources = ", ".join(map(str, self.sources))
        windows = f"{self.n_windows:,} windows of {self.max_seq_len} tokens"
        return f"{sources}: {windows}; {self.epoch(planned):.2f} passes planned"

    def epoch(self, samples: int) -> float:
        """Passes over the text after `samples` windows; in a mixture, over the source that was repeated most."""
        return max(self._order.epochs(samples))

    def epochs_by_source(self, samples: int) -> dict[str, float]:
        """Passes over each source after `samples` windows."""
        return dict(zip(self.sources, self._order.epochs(samples), strict=True))

    def report_fault(self, message: str) -> None:
        """Records what is wrong with the text, so that all ranks end at their next step; the first one counts."""
        self.fault = self.fault or message

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, to show text with. Raises DataError when the dataset has none, or it cannot be loaded."""
        if self.tokenizer is None:
            raise DataError(f"{self.tokenizer_file} is missing, without which there is no text to show: restore it")
        try:
            return Tokenizer.from_buffer(self.tokenizer)
        except Exception as err:  # the library raises bare Exception
            raise DataError(f"{self.tokenizer_file} cannot be loaded ({err}): restore the dataset") from err

    def notes(self) -> list[str]:
        """What could not be verified about the datasets, one line each."""
        return [line for source in self._splits for line in unverifiable(source.folder, source.manifest)]

    def require_true_token_bytes(self) -> None:
        """Raises DataError unless the bytes of each token are those of the tokenizer of its dataset."""
        for source in self._splits:
            if source.tokenizer is not None:
                require_bytes_of_tokenizer(source.folder, source.tokenizer, source.tables["token_bytes.npy"])

    def verify(self) -> None:
        """Reads every shard of the split. Raises DataError, naming the file, for one that is not as prepared."""
        for source in self._splits:
            for shard in source.shards:
                prove_shard(shard)


def text_fingerprint(manifests: Sequence[dict], parts: Sequence[int], split: str) -> str:
    """What identifies one split of a mixture, in every run state. parts: the windows of each dataset per block."""
    described = [[[m["fingerprint"], part] for m, part in zip(manifests, parts, strict=True)], split, packing.VERSION]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def raise_fault(faults: Sequence[str | None]) -> None:
    """Raises DataError with what the ranks found wrong in the data while the run trained, each message once, if any."""
    found = dict.fromkeys(fault for fault in faults if fault is not None)
    if found:
        raise DataError("\n".join(found))
