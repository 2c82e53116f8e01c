"""Writes a prepared dataset (docs/data.md) of random tokens, with any length and vocabulary, within seconds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

SKEW = 4
"""A token is a uniform number to this power times the vocabulary: a few tokens are frequent, as in text."""
HELD_OUT = 16
"""Held-out documents, copies of the first ones: the format requires some, and no benchmark reads them."""


def write_dataset(folder: Path, lengths: np.ndarray, *, vocab_size: int) -> None:
    """Writes documents of these lengths as one shard.

    lengths: (documents,) int64, in tokens with the end token, each at least 1. Documents that are whole windows fill
    whole windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    eod_id = vocab_size - 1
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    random = np.random.Generator(np.random.PCG64(0))
    drawn = random.random(int(lengths.sum()), dtype=np.float32)
    tokens = (drawn**SKEW * eod_id).astype(dtype)
    ends = np.cumsum(lengths).astype(np.int64)
    tokens[ends - 1] = eod_id
    n_held_out = min(HELD_OUT, len(ends))
    splits = {
        "train": _split(folder, "train", tokens, ends),
        "held_out": _split(folder, "held_out", tokens[: ends[n_held_out - 1]], ends[:n_held_out]),
    }
    np.save(folder / "token_bytes.npy", np.where(np.arange(vocab_size) == eod_id, 0, 1).astype(np.uint16))
    np.save(folder / "token_counts.npy", np.bincount(tokens, minlength=vocab_size).astype(np.int64))
    (folder / "tokenizer.json").write_text("{}")
    manifest = {
        "format": 1,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "eod_id": eod_id,
        "tokenizer_sha256": _sha256(folder / "tokenizer.json"),
        "splits": splits,
        "sources": [],
        "skipped": {},
        "overlap": {},
    }
    manifest["fingerprint"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _split(folder: Path, name: str, tokens: np.ndarray, ends: np.ndarray) -> dict:
    shard, shard_ends = folder / name / "shard_00000.bin", folder / name / "shard_00000.ends.npy"
    shard.parent.mkdir(exist_ok=True)
    tokens.tofile(shard)
    np.save(shard_ends, ends)
    return {
        "documents": len(ends),
        "tokens": len(tokens),
        "bytes": len(tokens) - len(ends),
        "shards": [
            {
                "file": f"{name}/{shard.name}",
                "tokens": len(tokens),
                "documents": len(ends),
                "sha256": _sha256(shard),
                "ends_sha256": _sha256(shard_ends),
            }
        ],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
