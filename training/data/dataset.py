"""Prepared datasets as batches of packed windows. A batch is a pure function of the seed and the sample numbers.

A sample number is the position of a window in the training order, counted over all epochs. Source: docs/data.md for
the files and the order, docs/gsa.md, sections 2 and 7, for doc_start and targets.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.config.exit_codes import ExitCode, Refusal
from training.data import packing
from training.data.order import BLOCK, Order

IGNORE = -100
FORMAT = 1
MANIFEST_KEYS = ("dtype", "vocab_size", "eod_id", "tokenizer_sha256", "fingerprint", "splits")


class DataError(Refusal):
    """A dataset is missing, damaged or unsuitable. The message names the file and says what to do."""

    exit_code = ExitCode.REFUSED_INPUT


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


@dataclass(frozen=True)
class _Shard:
    tokens: np.ndarray
    windows: packing.Windows


class _Split:
    """One split of one prepared dataset."""

    def __init__(self, folder: Path, split: str, window_tokens: int) -> None:
        self.folder, self.split = folder, split
        self.manifest = read_manifest(folder)
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.shards = []
        for entry in self.manifest["splits"][split]["shards"]:
            path = folder / entry["file"]
            ends_path = path.with_name(path.stem + ".ends.npy")
            _require_size(path, entry["tokens"] * dtype.itemsize)
            _require_sha256(ends_path, entry["ends_sha256"], folder)
            try:
                ends = np.load(ends_path)
            except (OSError, ValueError) as err:
                raise DataError(f"{ends_path}: {err}; {_mend(folder)}") from err
            if len(ends) != entry["documents"] or (len(ends) and ends[-1] != entry["tokens"]):
                raise DataError(f"{ends_path} does not describe {path.name}; {_mend(folder)}")
            if entry["tokens"]:
                windows = packing.cached_windows(path, ends, entry["ends_sha256"], window_tokens)
                self.shards.append(_Shard(_map(path, dtype, entry["tokens"]), windows))
        self.first_window = np.cumsum([0, *(len(shard.windows) for shard in self.shards)])
        self.n_windows = int(self.first_window[-1])
        if not self.n_windows:
            raise DataError(f"{folder}: its {split} split holds no text; prepare it again with more documents")
        self.targets = np.concatenate([shard.windows.targets for shard in self.shards])

    def fill(self, window: int, tokens: np.ndarray, targets: np.ndarray, doc_start: np.ndarray) -> None:
        """Writes one window into rows of length T that hold padding."""
        at = int(np.searchsorted(self.first_window, window, side="right")) - 1
        shard = self.shards[at]
        w = shard.windows
        local = window - int(self.first_window[at])
        position = 0
        for span in range(w.first[local], w.first[local + 1]):
            start, length, whole = int(w.start[span]), int(w.length[span]), bool(w.whole[span])
            here = slice(position, position + length)
            tokens[here] = shard.tokens[start : start + length]
            predicted = length - whole
            targets[position : position + predicted] = shard.tokens[start + 1 : start + 1 + predicted]
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
            if manifest["tokenizer_sha256"] != manifests[0]["tokenizer_sha256"]:
                raise DataError(
                    f"{folder} and {next(iter(self.sources))} were made with different tokenizers; prepare one "
                    f"again with --tokenizer of the other"
                )
        self.vocab_size: int = manifests[0]["vocab_size"]
        self.eod_id: int = manifests[0]["eod_id"]
        self.n_windows = sum(source.n_windows for source in self._splits)
        self.token_bytes: np.ndarray = np.load(Path(next(iter(self.sources))) / "token_bytes.npy")
        self._order = Order([source.n_windows for source in self._splits], list(self.sources.values()), seed)
        described = [
            [[m["fingerprint"], part] for m, part in zip(manifests, self._order.parts, strict=True)],
            split,
            packing.VERSION,
        ]
        self.fingerprint: str = hashlib.sha256(json.dumps(described).encode()).hexdigest()

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
        """The tokenizer that prepare_data wrote. It may be missing, since only code that shows text needs it."""
        return Path(next(iter(self.sources))) / "tokenizer.json"

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

    def verify(self) -> None:
        """Reads every shard and compares its sha256 with the manifest. Raises DataError, which names the file."""
        for source in self._splits:
            for entry in source.manifest["splits"][self.split]["shards"]:
                path = source.folder / entry["file"]
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise DataError(f"{path}: its sha256 is not that of the manifest; {_mend(source.folder)}")


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared dataset. Raises DataError when there is none or it cannot be used."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise DataError(f"{folder} is not a prepared dataset (no manifest.json); {_mend(folder)}") from err
    except json.JSONDecodeError as err:
        raise DataError(f"{path} is not JSON ({err}); {_mend(folder)}") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        manifest = manifest if isinstance(manifest, dict) else {}
        raise DataError(f"{path} has format {manifest.get('format')!r}, this project reads {FORMAT}; {_mend(folder)}")
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; {_mend(folder)}")
    return manifest


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The tokens of a shard, mapped into memory. It holds no file descriptor: a process has about 1000 of them."""
    assert sys.byteorder == "little"
    return torch.from_file(str(path), shared=False, size=count, dtype=getattr(torch, dtype.name)).numpy()


def _require_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; {_mend(path.parent.parent)}") from err
    if found != expected:
        raise DataError(f"{path} has {found} bytes, its manifest says {expected}; {_mend(path.parent.parent)}")


def _require_sha256(path: Path, expected: str, folder: Path) -> None:
    """Raises DataError for other content: a wrong document end would give wrong targets and a wrong window table."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; {_mend(folder)}") from err
    if found != expected:
        raise DataError(f"{path}: its sha256 is not that of the manifest; {_mend(folder)}")


def _mend(folder: Path) -> str:
    return f"make it with: python -m training.prepare_data --out {folder} ... (the quickstart's: make data)"
