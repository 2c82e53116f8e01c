"""The manifest of a prepared dataset and its tables: read as if a stranger had written them, without torch.

Nothing in them is used before it was checked: types and ranges of every value, the names of the files (which cannot
leave the folder), sizes, sums, and the sha256 of every table. Format: docs/data.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsa.files import read_small_file
from gsa.units import MIB
from training.config.exit_codes import ExitCode, Refusal

FORMAT = 1
MANIFEST_KEYS = ("dtype", "vocab_size", "eod_id", "tokenizer_sha256", "fingerprint", "splits")
SPLITS = ("train", "held_out")
TOKENIZER = "tokenizer.json"
TABLES = {"token_bytes.npy": "uint16", "token_counts.npy": "int64"}
"""The tables with one entry per token id, and their types."""
MAX_MANIFEST_BYTES = 64 * MIB
MAX_TOKENIZER_BYTES = 256 * MIB
MAX_VOCAB_SIZE = 1 << 24
MAX_DOCUMENTS = 1 << 26
"""Documents of a shard: it has at most as many tokens, unless one document fills it."""
_SHARD = re.compile(r"(train|held_out)/[A-Za-z0-9_-]+\.bin")
_NPY_HEADER_BYTES = 10_240
"""The most that a reader of numpy accepts as the header of a .npy file."""


class DataError(Refusal):
    """A dataset is missing, damaged or unsuitable. The message names the file and says what to do."""

    exit_code = ExitCode.REFUSED_INPUT


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest describes it. folder: of the dataset. path: of the shard. dtype: of its ids."""

    folder: Path
    path: Path
    dtype: np.dtype
    vocab_size: int
    tokens: int
    documents: int
    sha256: str
    ends_sha256: str

    @property
    def bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    @property
    def ends_path(self) -> Path:
        return self.path.with_name(self.path.stem + ".ends.npy")


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared dataset. Raises DataError when there is none or it cannot be used."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(read_small_file(path, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise DataError(f"{folder} is not a prepared dataset (no manifest.json); {how_to_make(folder)}") from err
    except OSError as err:
        raise DataError(f"{path} cannot be read: {err.strerror}; {how_to_mend(folder)}") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{path} is not JSON ({str(err)[:100]}); {how_to_mend(folder)}") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise DataError(f"{path} has format {found!r:.40}, this project reads {FORMAT}; {how_to_mend(folder)}")
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; {how_to_mend(folder)}")
    wrong = next(_wrong(manifest), None)
    if wrong:
        raise DataError(f"{path}: {wrong}; {how_to_mend(folder)}")
    return manifest


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a dataset, good or damaged, and not a checkpoint."""
    if all((folder / split).is_dir() for split in SPLITS):
        return True
    try:
        manifest = json.loads(read_small_file(folder / "manifest.json", MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "splits" in manifest


def shards_of(folder: Path, manifest: dict, split: str) -> list[Shard]:
    """The shards of one split, in order. manifest: as `read_manifest` returned it."""
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    return [
        Shard(
            folder,
            folder / entry["file"],
            dtype,
            manifest["vocab_size"],
            entry["tokens"],
            entry["documents"],
            entry["sha256"],
            entry["ends_sha256"],
        )
        for entry in manifest["splits"][split]["shards"]
    ]


def fingerprint_of(manifest: dict) -> str:
    """The fingerprint that prepare_data gives a dataset: of its tokenizer and of the bytes of its shards."""
    shards = [[s["sha256"], s["ends_sha256"]] for split in SPLITS for s in manifest["splits"][split]["shards"]]
    described = [manifest[k] for k in ("format", "dtype", "vocab_size", "eod_id", "tokenizer_sha256")] + shards
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _wrong(manifest: dict) -> Iterator[str]:
    """What is wrong with the values of a manifest, one sentence each; what follows a sentence may rely on it."""
    dtype, vocab, eod, splits = (manifest[key] for key in ("dtype", "vocab_size", "eod_id", "splits"))
    if dtype not in ("uint16", "uint32"):
        yield f"dtype is {dtype!r:.40}, not uint16 or uint32"
    most = min(MAX_VOCAB_SIZE, np.iinfo(dtype).max + 1)
    if not _is_whole(vocab, 1, most):
        yield f"vocab_size is {vocab!r:.40}, not a number from 1 to {most:,} (of {dtype})"
    if not _is_whole(eod, 0, vocab - 1):
        yield f"eod_id is {eod!r:.40}, not an id of its vocabulary of {vocab}"
    for key in ("fingerprint", "tokenizer_sha256", "token_bytes_sha256", "token_counts_sha256"):
        if not isinstance(manifest.get(key, ""), str):
            yield f"{key} is {manifest[key]!r:.40}, not a text"
    if not isinstance(splits, dict) or not set(SPLITS) <= splits.keys():
        yield f"splits has no {' and no '.join(SPLITS)}"
    for split in SPLITS:
        yield from _wrong_split(split, splits[split])
    if "key" in manifest and manifest["fingerprint"] != fingerprint_of(manifest):
        yield "its fingerprint is not that of its tokenizer and shards"


def _wrong_split(split: str, value: object) -> Iterator[str]:
    shards = value.get("shards") if isinstance(value, dict) else None
    if not isinstance(shards, list):
        yield f"its {split} split has no list of shards"
    for number, shard in enumerate(shards):
        where = f"shard {number} of {split}"
        if not isinstance(shard, dict):
            yield f"{where} is not described"
        name, tokens, documents = (shard.get(key) for key in ("file", "tokens", "documents"))
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or not name.startswith(f"{split}/"):
            yield f"{where} is the file {name!r:.80}, which is not a shard in its folder {split}"
        if not _is_whole(tokens, 0, 1 << 50) or not _is_whole(documents, bool(tokens), min(tokens, MAX_DOCUMENTS)):
            yield f"{where} has {tokens!r:.40} tokens in {documents!r:.40} documents, which cannot be"
        for key in ("sha256", "ends_sha256"):
            if not isinstance(shard.get(key), str):
                yield f"{where} has no {key}"
    if len({shard["file"] for shard in shards}) < len(shards):
        yield f"its {split} split names a shard twice"
    for key in ("tokens", "documents"):
        total = sum(shard[key] for shard in shards)
        if key in value and value[key] != total:
            yield f"its {split} split has {value[key]!r:.40} {key}, its shards {total}"


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def read_ends(shard: Shard) -> np.ndarray:
    """(documents,) int64: the exclusive end of each document of a shard, in tokens. Raises DataError."""
    path = shard.ends_path
    ends = _read_table(path, "int64", shard.documents, shard.ends_sha256, shard.folder)
    if shard.documents and not (ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == shard.tokens):
        raise DataError(f"{path} does not describe {shard.path.name}; {how_to_mend(shard.folder)}")
    return ends


def read_tables(folder: Path, manifest: dict) -> dict[str, np.ndarray]:
    """The tables of TABLES, each (vocab_size,), by file name, compared with their sha256 where the manifest has one.

    Raises DataError when one is missing, damaged, or cannot be true of any text.
    """
    tables = {
        name: _read_table(folder / name, dtype, manifest["vocab_size"], manifest.get(_key_of(name)), folder)
        for name, dtype in TABLES.items()
    }
    sizes, counts = tables["token_bytes.npy"].astype(np.int64), tables["token_counts.npy"]
    if counts.min() < 0 or counts.sum() != sum(shard["tokens"] for shard in manifest["splits"]["train"]["shards"]):
        raise DataError(f"{folder / 'token_counts.npy'} does not count the training text; {how_to_mend(folder)}")
    if counts.sum() > counts[manifest["eod_id"]] and not (sizes * (counts > 0)).any():
        raise DataError(f"{folder / 'token_bytes.npy'} gives no token of the text any byte; {how_to_mend(folder)}")
    return tables


def unverifiable(folder: Path, manifest: dict) -> list[str]:
    """One line for each table of a dataset whose sha256 its manifest, of an earlier version, does not hold."""
    return [
        f"{folder / name}: the manifest has no sha256 of it, so changes cannot be noticed; it is used as it is"
        for name in TABLES
        if _key_of(name) not in manifest
    ]


def read_tokenizer(folder: Path, manifest: dict) -> bytes | None:
    """The content of tokenizer.json; None when it is missing, since only code that shows text needs it.

    Raises DataError when it is not the tokenizer with which the text was prepared.
    """
    path = folder / TOKENIZER
    try:
        content = read_small_file(path, MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; {how_to_mend(folder)}") from err
    if hashlib.sha256(content).hexdigest() != manifest["tokenizer_sha256"]:
        raise DataError(f"{path}: {NOT_AS_PREPARED}; {how_to_mend(folder)}")
    return content


def require_size(shard: Shard) -> None:
    """Raises DataError unless the shard is a regular file of the size that the manifest gives."""
    path = shard.path
    try:
        found = path.stat()
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; {how_to_mend(shard.folder)}") from err
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is not a regular file; {how_to_mend(shard.folder)}")
    if found.st_size != shard.bytes:
        raise DataError(
            f"{path} has {found.st_size} bytes, its manifest says {shard.bytes}; {how_to_mend(shard.folder)}"
        )


def _read_table(path: Path, dtype: str, count: int, sha256: str | None, folder: Path) -> np.ndarray:
    kind = np.dtype(dtype)
    try:
        raw = read_small_file(path, count * kind.itemsize + _NPY_HEADER_BYTES)
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; {how_to_mend(folder)}") from err
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(f"{path}: {NOT_AS_PREPARED}; {how_to_mend(folder)}")
    try:
        return parse_npy(raw, kind, (count,))
    except ValueError as err:
        raise DataError(f"{path}: {err}; {how_to_mend(folder)}") from err


def parse_npy(raw: bytes, dtype: np.dtype, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The read-only array in the content of a .npy file, which must be of this type and shape; None: of one axis.

    Nothing is allocated by what the header says. Raises ValueError for any other content.
    """
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found_shape, _, found = read_header(stream)
    except Exception as err:  # numpy's parser of a forged header raises errors of many kinds
        raise ValueError(f"not a .npy file ({str(err)[:80]!a})") from err
    body = memoryview(raw)[stream.tell() :]
    if shape is None:
        shape = (len(body) // dtype.itemsize,)
    if found != dtype or found_shape != shape or len(body) != shape[0] * dtype.itemsize:
        raise ValueError(f"holds {found} of shape {found_shape!r:.60}, not {dtype} of shape {shape}")
    return np.frombuffer(body, dtype)


NOT_AS_PREPARED = "its sha256 is not that of the manifest"


def how_to_make(folder: Path) -> str:
    return f"make it with: python -m training.prepare_data --out {folder} ... (the quickstart's: make data)"


def how_to_mend(folder: Path) -> str:
    return (
        f"restore the dataset from a copy, or make it again: python -m training.prepare_data --force "
        f"--out {folder} ... (the quickstart's: make data)"
    )


def _key_of(table: str) -> str:
    return f"{os.path.splitext(table)[0]}_sha256"
