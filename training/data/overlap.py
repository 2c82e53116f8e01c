"""The overlap report: how much of the held-out text also occurs in the training text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GRAM_TOKENS = 13
BLOCK_TOKENS = 1 << 21
"""Training tokens that are hashed at once; it bounds the memory."""


def overlap_report(out: Path, manifest: dict, held_out_names: list[str]) -> dict:
    """The share of each held-out document's 13-grams of tokens that also occur in the training text.

    This finds leaks that exact deduplication cannot see. The documents are named and counted, not dropped.
    out: the folder of the dataset, whose shards are written. held_out_names: one per held-out document, in order.
    """
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    documents = _documents(out, manifest["splits"]["held_out"], dtype)
    grams = [_grams(document[:-1]) for document in documents]
    known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, np.uint64)
    in_training = np.zeros(len(known), dtype=bool)
    if len(known):
        for shard in manifest["splits"]["train"]["shards"]:
            tokens = np.memmap(out / shard["file"], dtype=dtype, mode="r") if shard["tokens"] else np.zeros(0, dtype)
            for begin in range(0, len(tokens), BLOCK_TOKENS):
                found = np.unique(_grams(tokens[begin : begin + BLOCK_TOKENS + GRAM_TOKENS - 1]))
                at = np.searchsorted(known, found).clip(max=len(known) - 1)
                in_training[at[known[at] == found]] = True
    shares = [float(in_training[np.searchsorted(known, g)].mean()) if len(g) else 0.0 for g in grams]
    worst = sorted(zip(shares, held_out_names, strict=True), reverse=True)[:10]
    return {
        "gram_tokens": GRAM_TOKENS,
        "documents": len(documents),
        "above_half": sum(share > 0.5 for share in shares),
        "mean_share": float(np.mean(shares)) if shares else 0.0,
        "worst": [{"document": name, "share": round(share, 4)} for share, name in worst if share > 0],
    }


def _documents(out: Path, split: dict, dtype: np.dtype) -> list[np.ndarray]:
    documents = []
    for shard in split["shards"]:
        path = out / shard["file"]
        if shard["tokens"]:
            tokens, ends = (np.memmap(path, dtype=dtype, mode="r"), np.load(path.with_name(path.stem + ".ends.npy")))
            documents += np.split(tokens, ends[:-1])
    return documents


def _grams(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of GRAM_TOKENS tokens; empty when there are fewer."""
    n = len(tokens) - GRAM_TOKENS + 1
    if n <= 0:
        return np.zeros(0, np.uint64)
    value = np.zeros(n, np.uint64)
    for i in range(GRAM_TOKENS):
        value = (value + tokens[i : i + n].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value
