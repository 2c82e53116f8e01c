"""Writes a prepared dataset (docs/data.md) from token lists, for tests of the code that reads one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


def write_dataset(
    folder: Path, train: list[list[int]], *, vocab_size: int, held_out: list[list[int]], shard_tokens: int = 2**26
) -> dict:
    """Writes the dataset; returns its manifest.

    train, held_out: documents, as token lists without the end-of-document token, which is vocab_size - 1.
    shard_tokens: a shard is closed before it would exceed this.
    """
    eod = vocab_size - 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, documents in (("train", train), ("held_out", held_out)):
        (folder / split).mkdir(exist_ok=True)
        shards, batch, size = [], [], 0
        groups = []
        for document in documents:
            if batch and size + len(document) + 1 > shard_tokens:
                groups.append(batch)
                batch, size = [], 0
            batch.append([*document, eod])
            size += len(document) + 1
        groups.append(batch)
        for i, group in enumerate(groups):
            tokens = np.concatenate([np.asarray(d) for d in group]).astype(f"<{dtype[0]}{np.dtype(dtype).itemsize}")
            path = folder / split / f"shard_{i:05d}.bin"
            path.write_bytes(tokens.tobytes())
            np.save(path.with_name(path.stem + ".ends.npy"), np.cumsum([len(d) for d in group]).astype(np.int64))
            shards.append(
                {
                    "file": f"{split}/{path.name}",
                    "tokens": len(tokens),
                    "documents": len(group),
                    "sha256": _sha(path),
                    "ends_sha256": _sha(path.with_name(path.stem + ".ends.npy")),
                }
            )
        splits[split] = {
            "documents": len(documents),
            "tokens": sum(s["tokens"] for s in shards),
            "bytes": 0,
            "shards": shards,
        }
    sizes = [0 if token == eod else len(f"w{token}") for token in range(vocab_size)]
    np.save(folder / "token_bytes.npy", np.array(sizes, np.uint16))
    flat = np.concatenate([np.asarray([*d, eod]) for d in train])
    np.save(folder / "token_counts.npy", np.bincount(flat, minlength=vocab_size).astype(np.int64))
    (folder / "tokenizer.json").write_text(word_tokenizer(vocab_size).to_str())
    manifest = {
        "format": 1,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "eod_id": eod,
        "tokenizer_sha256": _sha(folder / "tokenizer.json"),
        "splits": splits,
        "sources": [],
        "skipped": {},
        "overlap": {},
    }
    manifest["fingerprint"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer whose token i is the word "wi"; the last token is the end-of-document token."""
    words = {f"w{i}": i for i in range(vocab_size - 1)} | {"<|endoftext|>": vocab_size - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
