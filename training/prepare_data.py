"""Turns text into memory-mapped token shards with a manifest: `python -m training.prepare_data --out DIR ...`.

Two passes over the input, each in parallel over work units (a few MB of files each, or one large file): the
first checks and hashes every document, the second tokenises what is kept. A unit's result appears by a
rename, so a killed preparation goes on with the units that are missing. Nothing depends on the number of
workers. Memory: about 100 bytes per document, and one document per worker. Formats: docs/data.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # as a script: see training/train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

from training.data import tokenizer as bpe  # noqa: E402
from training.data.corpus import (  # noqa: E402
    BadRecord,
    Document,
    PrepareError,
    Reading,
    Source,
    count_unknown,
    embedded_files,
    find_files,
    read_documents,
)

FORMAT = 1
CODE_VERSION = 2
"""Part of every key: raise it when the same input would give other files."""

UNIT_BYTES = 4 << 20
SHARD_TOKENS = 1 << 26
SAMPLE_BYTES = 40 << 20
GRAM = 13
SPLITS = ("train", "held_out")
COUNT_TOKENS = 1 << 22
OWNED = "made by prepare_data"
"""A file in the work folder: what else lies in the dataset's folder is ours to replace."""


@dataclass(frozen=True)
class Unit:
    """Files that are prepared together."""

    number: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Job:
    """What a worker needs: picklable, no handles."""

    unit: Unit
    work: str
    key: str
    how: Reading
    skip_bad: bool
    eod_id: int = -1


def main(argv: list[str]) -> int:
    args = _parse(argv)
    try:
        return _prepare(args)
    except PrepareError as err:
        print(f"error: {err}", file=sys.stderr)
        return 3


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help=".txt .md .jsonl .jsonl.gz .jsonl.zst .parquet, folders, globs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the prepared dataset")
    parser.add_argument(
        "--embedded", action="store_true", help="the source text of Python and of this project's dependencies"
    )
    parser.add_argument("--vocab-size", type=int, help="entries of the byte-level BPE to train (default: 8192)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or qwen.tiktoken, in place of training one")
    parser.add_argument(
        "--eod-token", default=bpe.EOD, help="end-of-document token of the tokenizer (default: %(default)s)"
    )
    parser.add_argument(
        "--text-field", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    parser.add_argument("--group-field", help="field whose records stay in one split (default: each record by itself)")
    parser.add_argument("--held-out", type=float, default=0.015, help="share of groups held out (default: %(default)s)")
    parser.add_argument(
        "--limit-mb", type=float, help="keep about this many MB of documents, chosen by hash (default: all)"
    )
    parser.add_argument(
        "--max-document-mb", type=int, default=64, help="largest document, in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        help="a bad document ends it, or is counted (default: error; skip for --embedded)",
    )
    parser.add_argument("--force", action="store_true", help="replace a dataset made from other input or options")
    args = parser.parse_args(argv)
    if args.embedded == bool(args.inputs):
        parser.error("give INPUT files, or --embedded")
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab-size belongs to a tokenizer that is trained; leave it out with --tokenizer")
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out} is a share: between 0 and 1")
    for name in ("workers", "max_document_mb"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.limit_mb is not None and not args.limit_mb > 0:
        parser.error("--limit-mb must be above 0")
    return args


def _prepare(args: argparse.Namespace) -> int:
    sources = embedded_files() if args.embedded else find_files(args.inputs)
    skip_bad = (args.on_bad or ("skip" if args.embedded else "error")) == "skip"
    how = Reading(args.text_field, args.group_field, args.max_document_mb << 20)
    given = bpe.load(args.tokenizer) if args.tokenizer else None
    eod = args.eod_token
    if given is not None and given.token_to_id(eod) is None:
        raise PrepareError(
            f"--tokenizer {args.tokenizer} has no token {eod!r}; name its end of document with --eod-token"
        )
    vocab = None if given else args.vocab_size or 8192
    options = {
        "code": CODE_VERSION,
        "reading": asdict(how),
        "skip_bad": skip_bad,
        "held_out": args.held_out,
        "limit_mb": args.limit_mb,
        "vocab_size": vocab,
        "tokenizer": bpe.sha256(given) if given else None,
        "eod": eod,
    }
    key = _key([options, [_stamp(source) for source in sources]])
    finished = _finished(args.out, key, args.force)
    if finished:
        print(f"{args.out} is prepared already from this input\n{_summary(finished, args.out)}")
        return 0

    work = args.out / "work"
    units = _units(sources)
    with ProcessPoolExecutor(
        args.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_worker
    ) as pool:
        scans = _each(pool, _scan, [Job(unit, str(work), key, how, skip_bad) for unit in units], "reading")
        keep, skipped = _choose(scans, args.limit_mb)
        skipped += Counter(unknown_kind=count_unknown(args.inputs))
        held_out = _held_out_groups(scans, keep, args.held_out)
        tokenizer = given or _trained(work, key, units, scans, keep, held_out, how, vocab)
        _write(work / "tokenizer.json", tokenizer.to_str())
        eod_id = tokenizer.token_to_id(eod)
        encode_key = _key([key, bpe.sha256(tokenizer)])
        jobs = []
        for unit, scan, kept in zip(units, scans, keep, strict=True):
            plan = np.where(kept, np.isin(scan["groups"], held_out).astype(np.uint8) + 1, 0).astype(np.uint8)
            _save(work / f"plan_{unit.number:05d}.npy", plan)
            jobs.append(Job(unit, str(work), encode_key, how, skip_bad, eod_id))
        encoded = _each(pool, _encode_unit, jobs, "encoding")
    manifest = _assemble(args.out, work, tokenizer, eod, units, encoded)
    manifest |= {"skipped": dict(sorted(skipped.items())), "sources": _sources(units, scans, keep), "key": key}
    manifest["overlap"] = _overlap(args.out, manifest)
    manifest["fingerprint"] = _fingerprint(manifest)
    _write(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(work)
    print(_summary(manifest, args.out))
    return 0


def _finished(out: Path, key: str, force: bool) -> dict | None:
    """The manifest of a dataset made from the same input; None when there is work to do, and a place for it.

    PrepareError when the folder holds anything but a dataset or unfinished work of ours, whatever force says.
    """
    path, work = out / "manifest.json", out / "work"
    manifest = _manifest(path)
    if manifest is None and not (work / OWNED).exists() and any(p.is_file() for p in out.rglob("*")):
        raise PrepareError(f"{out} holds other files, which a dataset might replace; give another --out")
    if manifest is None:
        work.mkdir(parents=True, exist_ok=True)
        (work / OWNED).touch()
        return None
    if manifest["key"] == key:
        return manifest
    if not force:
        raise PrepareError(
            f"{out} holds a dataset made from other input or options (or files changed since); "
            f"give another --out, or --force to replace it"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / OWNED).touch()
    for name in ("manifest.json", "tokenizer.json", "token_bytes.npy", "token_counts.npy"):
        (out / name).unlink(missing_ok=True)
    for name in (*SPLITS, "packed"):
        shutil.rmtree(out / name, ignore_errors=True)
    return None


def _manifest(path: Path) -> dict | None:
    """The manifest of a dataset of ours, None when there is none: run folders have a manifest.json too."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    ours = isinstance(manifest, dict) and {"key", "splits", "fingerprint"} <= manifest.keys()
    return manifest if ours else None


def _stamp(source: Source) -> list:
    stat = os.stat(source.path)
    return [source.name, stat.st_size, stat.st_mtime_ns]


def _units(sources: list[Source]) -> list[Unit]:
    units, batch, size = [], [], 0
    for source in sources:
        grown = size + os.path.getsize(source.path)
        if batch and grown > UNIT_BYTES:
            units.append(Unit(len(units), tuple(batch)))
            batch, grown = [], os.path.getsize(source.path)
        batch.append(source)
        size = grown
    return [*units, Unit(len(units), tuple(batch))]


def _worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    # a pool's processes outlive a parent that is killed: they themselves hold open the queue they wait on
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _each(pool: ProcessPoolExecutor, work: Callable[[Job], dict], jobs: list[Job], title: str) -> list[dict]:
    """Results in order, with a bar on a terminal. The first bad document in order ends it, not in time."""
    results = []
    try:
        for result in tqdm(
            pool.map(work, jobs), total=len(jobs), desc=title, unit="unit", disable=not sys.stderr.isatty()
        ):
            if result["error"]:
                pool.shutdown(cancel_futures=True)
                raise PrepareError(
                    f"{result['error']}. Mend it, or count and leave out such documents with --on-bad skip"
                )
            results.append(result)
    except BrokenProcessPool as err:
        raise PrepareError(
            f"a worker was killed while {title} (out of memory?); run the command again to go on"
        ) from err
    return results


def _read_unit(job: Job) -> Iterator[tuple[Source, Document | BadRecord]]:
    for source in job.unit.sources:
        for item in read_documents(source, job.how):
            yield source, item


# -- first pass: what is there ------------------------------------------------------------------------


def _scan(job: Job) -> dict:
    """Hash, group, size and source of each document of a unit; counts of the bad ones. Kept in work/scan_*.npz."""
    path = Path(job.work) / f"scan_{job.unit.number:05d}.npz"
    if cached := _cached(path, job.key):
        return cached
    hashes, groups, sizes, origin, bad, error = [], [], [], [], Counter(), ""
    for source, item in _read_unit(job):
        if isinstance(item, BadRecord):
            bad[item.kind] += 1
            if not job.skip_bad:
                error = str(item)
                break
            continue
        raw = item.text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        hashes.append(digest)
        groups.append(
            digest[:8] if item.group is None else hashlib.blake2b(item.group.encode(), digest_size=8).digest()
        )
        sizes.append(len(raw))
        origin.append(job.unit.sources.index(source))
    result = {
        "hashes": np.frombuffer(b"".join(hashes), dtype=np.dtype("<u8")).reshape(-1, 2),
        "groups": np.frombuffer(b"".join(groups), dtype="<u8"),
        "sizes": np.asarray(sizes, np.int64),
        "origin": np.asarray(origin, np.int64),
        "bad": json.dumps(bad),
        "error": error,
        "key": job.key,
    }
    if not error:
        _save(path, result)
    return result


def _cached(path: Path, key: str) -> dict | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        result = {name: file[name] if file[name].ndim else file[name].item() for name in file.files}
    return result if result["key"] == key else None


def _choose(scans: list[dict], limit_mb: float | None) -> tuple[list[np.ndarray], Counter]:
    """Which documents stay: the first of equal ones, and under limit_mb those of the lowest hash. Counts the rest."""
    skipped = Counter()
    for scan in scans:
        skipped.update(json.loads(scan["bad"]))
    hashes = np.concatenate([scan["hashes"] for scan in scans])
    sizes = np.concatenate([scan["sizes"] for scan in scans])
    if not len(hashes):
        raise PrepareError(f"no document was found in the input (left out: {dict(skipped) or 'nothing'})")
    keep = np.zeros(len(hashes), dtype=bool)
    # lexsort is stable: within equal hashes the first document stays first
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    keep[order[np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])]] = True
    skipped["duplicate"] += int((~keep).sum())
    if limit_mb is not None:
        unique = order[keep[order]]  # by rising hash, so a keyed random subset
        beyond = unique[np.cumsum(sizes[unique]) > limit_mb * 1e6]
        keep[beyond] = False
        skipped["beyond_limit_mb"] += len(beyond)
    bounds = np.cumsum([len(scan["sizes"]) for scan in scans])[:-1]
    return np.split(keep, bounds), +skipped


def _held_out_groups(scans: list[dict], keep: list[np.ndarray], share: float) -> np.ndarray:
    """Hashes of the groups that are held out: a keyed hash below `share`, and at least one group of two."""
    groups = np.unique(np.concatenate([scan["groups"][kept] for scan, kept in zip(scans, keep, strict=True)]))
    if len(groups) < 2:
        raise PrepareError(
            "all documents are of one group: nothing can be held out; give more files, or name a --group-field"
        )
    keyed = np.array(
        [
            int.from_bytes(hashlib.blake2b(g.tobytes(), key=b"held-out 1", digest_size=8).digest(), "little")
            for g in groups
        ],
        dtype=np.uint64,
    )
    chosen = groups[keyed < np.uint64(min(share * 2.0**64, 2.0**64 - 2**12))]
    if len(chosen) == len(groups):
        chosen = groups[keyed != keyed.max()]
    return chosen if len(chosen) else groups[[int(keyed.argmin())]]


def _trained(
    work: Path,
    key: str,
    units: list[Unit],
    scans: list[dict],
    keep: list[np.ndarray],
    held_out: np.ndarray,
    how: Reading,
    vocab: int,
) -> Tokenizer:
    """A tokenizer trained on at most SAMPLE_BYTES of training documents, those of the lowest hash."""
    path = work / f"trained_{key[:16]}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    usable = [kept & ~np.isin(scan["groups"], held_out) for scan, kept in zip(scans, keep, strict=True)]
    sizes = np.concatenate([scan["sizes"][use] for scan, use in zip(scans, usable, strict=True)])
    first = np.concatenate([scan["hashes"][use, 0] for scan, use in zip(scans, usable, strict=True)])
    order = np.argsort(first, kind="stable")
    inside = order[np.cumsum(sizes[order]) <= SAMPLE_BYTES]
    limit = first[inside[-1]] if len(inside) else first[order[0]]

    def texts() -> Iterator[str]:
        for unit, scan, use in zip(units, scans, usable, strict=True):
            wanted = use & (scan["hashes"][:, 0] <= limit)
            if wanted.any():
                documents = (d for s in unit.sources for d in read_documents(s, how) if isinstance(d, Document))
                yield from (d.text for d, want in zip(documents, wanted, strict=True) if want)

    print(f"training a byte-level BPE of {vocab} entries on {sizes[first <= limit].sum() / 1e6:.0f} MB", flush=True)
    tokenizer = bpe.train(texts(), vocab)
    _write(path, tokenizer.to_str())
    return tokenizer


# -- second pass: tokens ------------------------------------------------------------------------------


def _encode_unit(job: Job) -> dict:
    """Tokens and document ends of a unit's kept documents, per split, in work/; its json last."""
    work = Path(job.work)
    stem = f"unit_{job.unit.number:05d}"
    done = work / f"{stem}.json"
    if done.exists() and (result := json.loads(done.read_text()))["key"] == job.key:
        return result
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    plan = np.load(work / f"plan_{job.unit.number:05d}.npy")
    vocab = bpe.vocab_size(tokenizer)
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    out = {split: {"names": [], "ends": [], "tokens": 0, "bytes": 0} for split in SPLITS}
    files = {split: open(work / f"{stem}.{split}.bin.tmp", "wb") for split in SPLITS}
    documents = (item for _, item in _read_unit(job) if isinstance(item, Document))
    try:
        for document, choice in zip(documents, plan, strict=True):
            if not choice:
                continue
            ids = np.asarray([*bpe.encode(tokenizer, document.text), job.eod_id], dtype=np.int64)
            if int(ids.max()) >= vocab:
                # astype would wrap 70000 to 4464 in silence
                return {
                    "error": f"{document.where}: token id {ids.max()} is outside the vocabulary of {vocab}",
                    "key": job.key,
                }
            split = SPLITS[choice - 1]
            files[split].write(ids.astype(dtype).tobytes())
            entry = out[split]
            entry["tokens"] += len(ids)
            entry["bytes"] += len(document.text.encode())
            entry["ends"].append(entry["tokens"])
            if split == "held_out":
                entry["names"].append(document.where)
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    for split in SPLITS:
        os.replace(work / f"{stem}.{split}.bin.tmp", work / f"{stem}.{split}.bin")
        _save(work / f"{stem}.{split}.ends.npy", np.asarray(out[split].pop("ends"), np.int64))
    result = {"error": "", "key": job.key, "splits": out}
    _write(done, json.dumps(result))
    return result


# -- assembly -----------------------------------------------------------------------------------------


def _assemble(out: Path, work: Path, tokenizer: Tokenizer, eod: str, units: list[Unit], encoded: list[dict]) -> dict:
    """Shards in unit order, each of whole documents and about SHARD_TOKENS at most; the manifest without reports."""
    vocab = bpe.vocab_size(tokenizer)
    dtype = "uint16" if vocab <= 1 << 16 else "uint32"
    shutil.copyfile(work / "tokenizer.json", out / "tokenizer.json")
    _save(out / "token_bytes.npy", bpe.token_bytes(tokenizer))
    counts = np.zeros(vocab, dtype=np.int64)
    splits = {}
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        writer = _ShardWriter(out, split, np.dtype(dtype).newbyteorder("<"))
        for unit, result in zip(units, encoded, strict=True):
            entry = result["splits"][split]
            if entry["tokens"]:
                stem = f"unit_{unit.number:05d}.{split}"
                # mapped, not read: a unit may be one file of any size
                tokens = np.memmap(work / f"{stem}.bin", dtype=writer.dtype, mode="r")
                for begin in range(0, len(tokens) if split == "train" else 0, COUNT_TOKENS):
                    counts += np.bincount(tokens[begin : begin + COUNT_TOKENS], minlength=vocab)
                writer.add(tokens, np.load(work / f"{stem}.ends.npy"))
        shards = writer.close()
        splits[split] = {
            "documents": sum(s["documents"] for s in shards),
            "tokens": sum(s["tokens"] for s in shards),
            "bytes": sum(r["splits"][split]["bytes"] for r in encoded),
            "shards": shards,
        }
    _save(out / "token_counts.npy", counts)
    names = [name for result in encoded for name in result["splits"]["held_out"]["names"]]
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab,
        "eod_id": tokenizer.token_to_id(eod),
        "tokenizer_sha256": _sha256(out / "tokenizer.json"),
        "token_bytes_sha256": _sha256(out / "token_bytes.npy"),
        "token_counts_sha256": _sha256(out / "token_counts.npy"),
        "splits": splits,
        "held_out_names": names,
    }


class _ShardWriter:
    """Appends documents to shards of one split; a shard is closed before it would exceed SHARD_TOKENS."""

    def __init__(self, out: Path, split: str, dtype: np.dtype) -> None:
        self._out, self._split, self.dtype = out, split, dtype
        self._tokens: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._size = 0
        self._shards: list[dict] = []

    def add(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        while len(ends):
            fits = int(np.searchsorted(ends, SHARD_TOKENS - self._size, side="right"))
            if fits == 0 and self._size == 0:
                fits = 1  # one document larger than a shard has a shard to itself
            if fits:
                used = int(ends[fits - 1])
                self._tokens.append(tokens[:used])
                self._ends.append(ends[:fits] + self._size)
                self._size += used
                tokens, ends = tokens[used:], ends[fits:] - used
            if len(ends):
                self._flush()

    def _flush(self) -> None:
        path = self._out / self._split / f"shard_{len(self._shards):05d}.bin"
        with open(path, "wb") as file:
            for part in self._tokens:
                part.tofile(file)
        ends = np.concatenate(self._ends) if self._ends else np.zeros(0, np.int64)
        ends_path = path.with_name(path.stem + ".ends.npy")
        _save(ends_path, ends)
        self._shards.append(
            {
                "file": f"{self._split}/{path.name}",
                "tokens": self._size,
                "documents": len(ends),
                "sha256": _sha256(path),
                "ends_sha256": _sha256(ends_path),
            }
        )
        self._tokens, self._ends, self._size = [], [], 0

    def close(self) -> list[dict]:
        if self._size or not self._shards:
            self._flush()
        return self._shards


def _sources(units: list[Unit], scans: list[dict], keep: list[np.ndarray]) -> list[dict]:
    """What the text came from, kept documents only: per file, or per top folder where there are many files."""
    many = sum(len(unit.sources) for unit in units) > 200
    total: dict[str, list] = {}
    for unit, scan, kept in zip(units, scans, keep, strict=True):
        for i, source in enumerate(unit.sources):
            here = kept & (scan["origin"] == i)
            name = source.name.partition("/")[0] if many else source.name
            entry = total.setdefault(name, [0, 0, hashlib.sha256()])
            entry[0] += int(scan["sizes"][here].sum())
            entry[1] += int(here.sum())
            entry[2].update(scan["hashes"][here].tobytes())
    return [
        {"name": name, "bytes": size, "documents": documents, "sha256": sha.hexdigest()}
        for name, (size, documents, sha) in sorted(total.items())
        if documents
    ]


# -- overlap ------------------------------------------------------------------------------------------


def _overlap(out: Path, manifest: dict) -> dict:
    """How much of each held-out document also stands in the training text, by 13-grams of tokens.

    A leak that exact deduplication cannot see. Documents are named and counted, not dropped.
    """
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    held = _documents(out, manifest["splits"]["held_out"], dtype)
    names = manifest.pop("held_out_names")
    grams = [_grams(document[:-1]) for document in held]
    known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, np.uint64)
    seen = np.zeros(len(known), dtype=bool)
    if len(known):
        for shard in manifest["splits"]["train"]["shards"]:
            tokens = np.memmap(out / shard["file"], dtype=dtype, mode="r") if shard["tokens"] else np.zeros(0, dtype)
            for begin in range(0, len(tokens), 1 << 21):
                found = np.unique(_grams(tokens[begin : begin + (1 << 21) + GRAM - 1]))
                at = np.searchsorted(known, found).clip(max=len(known) - 1)
                seen[at[known[at] == found]] = True
    shares = [float(seen[np.searchsorted(known, g)].mean()) if len(g) else 0.0 for g in grams]
    worst = sorted(zip(shares, names, strict=True), reverse=True)[:10]
    return {
        "gram_tokens": GRAM,
        "documents": len(held),
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
    """A 64-bit hash of each run of GRAM tokens; empty when there are fewer."""
    n = len(tokens) - GRAM + 1
    if n <= 0:
        return np.zeros(0, np.uint64)
    value = np.zeros(n, np.uint64)
    for i in range(GRAM):
        value = (value + tokens[i : i + n].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


# -- small things -------------------------------------------------------------------------------------


def _fingerprint(manifest: dict) -> str:
    shards = [[s["sha256"], s["ends_sha256"]] for split in SPLITS for s in manifest["splits"][split]["shards"]]
    return _key([manifest[k] for k in ("format", "dtype", "vocab_size", "eod_id", "tokenizer_sha256")] + shards)


def _summary(manifest: dict, out: Path) -> str:
    train, held = (manifest["splits"][split] for split in SPLITS)
    skipped = ", ".join(f"{count} {kind}" for kind, count in manifest["skipped"].items()) or "nothing"
    overlap = manifest["overlap"]
    return (
        f"{out}: {train['documents']:,} documents, {train['tokens']:,} tokens, {train['bytes'] / 1e6:.1f} MB, "
        f"{train['bytes'] / max(1, train['tokens'] - train['documents']):.2f} bytes per token\n"
        f"  held out: {held['documents']:,} documents, {held['tokens']:,} tokens, {held['bytes'] / 1e6:.2f} MB; "
        f"{overlap['above_half']} of them stand for more than half in the training text (13-grams)\n"
        f"  left out: {skipped}\n"
        f"  vocabulary {manifest['vocab_size']:,}, {manifest['dtype']}, fingerprint {manifest['fingerprint'][:16]}"
    )


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _save(path: Path, content: np.ndarray | dict) -> None:
    """An array as .npy or a dict of them as .npz, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **content) if isinstance(content, dict) else np.save(file, content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
