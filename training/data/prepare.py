"""From text files to a prepared dataset: token shards with a manifest. Formats: docs/data.md.

There are two passes over the input. Each runs in parallel over units (a few MB of files, or one large file). The first
pass checks and hashes every document; the second tokenises the documents that are chosen, and compares each with what
the first pass read and with what the tokenizer gives back. Each unit's result is
written whole or not at all, so a killed preparation continues with the units that are missing. The result does not
depend on the number of workers. Memory: about 100 bytes per document, and one document per worker.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from gsa.files import read_small_file, write_atomically
from training.config.lease import LEASE
from training.data import tokenizer as bpe
from training.data.corpus import (
    BadRecord,
    Document,
    PrepareError,
    Reading,
    Source,
    WorkerKilled,
    embedded_files,
    known_suffix,
    printable,
    read_documents,
)
from training.data.finding import Found, LeftOut, find_files
from training.data.manifest import MAX_MANIFEST_BYTES, DataError, fingerprint_of, is_dataset
from training.data.overlap import overlap_report
from training.data.pace import SAMPLE_BYTES, Progress, at_once, estimate
from training.data.proof import prove_dataset

FORMAT = 1
CODE_VERSION = 2
"""Part of every key: raise it when the same input would give other files."""

UNIT_BYTES = 4 << 20
SHARD_TOKENS = 1 << 26
TOKENIZER_TEXT_BYTES = 40 << 20
"""The most text that a tokenizer is trained on."""
COUNT_TOKENS = 1 << 22
"""Tokens that are counted at once; it bounds the memory."""
DEFAULT_VOCAB_SIZE = 8192
ANNOUNCE_BYTES = 16 << 20
"""Input of at least this size takes long enough for an estimate of its time."""
POLL_S = 0.5
"""Between two looks at the progress of the workers."""
COUNT_BYTES = 1 << 20
"""A worker adds its progress to that of the others after this much."""
NAMED = 5
"""The manifest and the summary name this many of each kind of thing that was left out."""
LEAVE_OUT = "Mend it, or count and leave out such documents with --on_bad skip"
OnChanged = Literal["error", "skip", "keep"]
"""What happens to a document that the tokenizer does not give back as it was."""
SPLITS = ("train", "held_out")
OWNED = "made by prepare_data"
"""A file of this name in the work folder marks the dataset's folder as one that prepare_data may replace."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how.

    inputs: files, folders and globs; empty for the embedded corpus.
    reading: the fields of a record, and the largest document.
    vocab_size: entries of the tokenizer to train; None: DEFAULT_VOCAB_SIZE, or that of `tokenizer`.
    tokenizer: a tokenizer file to use instead of training one.
    eod_token: the tokenizer's end-of-document token.
    held_out: share of the groups that are held out, between 0 and 1.
    limit_mb: about how many MB of documents to use; None: all.
    skip_bad: whether a bad document is counted and left out; otherwise it ends the preparation.
    force: whether a dataset made from other input or options is replaced.
    on_changed: what happens to a document that the tokenizer does not give back as it was.
    """

    out: Path
    inputs: tuple[str, ...]
    reading: Reading
    vocab_size: int | None
    tokenizer: Path | None
    eod_token: str
    held_out: float
    limit_mb: float | None
    skip_bad: bool
    workers: int
    force: bool
    on_changed: OnChanged = "error"


class Prepared(NamedTuple):
    """The manifest of a dataset, and whether it was complete before this call."""

    manifest: dict
    was_finished: bool


@dataclass(frozen=True)
class Unit:
    """Files that are prepared together."""

    number: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Job:
    """The input of a worker. It holds no open files, so that it can be pickled."""

    unit: Unit
    work: str
    key: str
    how: Reading
    skip_bad: bool
    eod_id: int = -1
    on_changed: OnChanged = "error"


def prepare(options: PrepareOptions) -> Prepared:
    """Prepares a dataset in options.out, or continues one that was interrupted; does nothing when it is complete.

    Raises PrepareError when the input, the tokenizer, the folder or its disk cannot be used; the message says how to
    mend it.
    """
    try:
        return _prepare(options)
    except OSError as err:
        raise PrepareError(_refused_by_disk(err, options.out)) from err


def _prepare(options: PrepareOptions) -> Prepared:
    out, how = options.out, options.reading
    found = find_files(options.inputs, without=out) if options.inputs else Found(embedded_files(), [])
    sources = found.sources
    unreadable = next((item for item in found.left_out if item.kind == "unreadable"), None)
    if unreadable is not None and not options.skip_bad:
        raise PrepareError(f"{unreadable}. {LEAVE_OUT}")
    eod = options.eod_token
    given = _given_tokenizer(options.tokenizer, eod) if options.tokenizer else None
    vocab = None if given else options.vocab_size or DEFAULT_VOCAB_SIZE
    key = _input_key(options, vocab, given, sources)
    finished = _finished(out, key, options.force)
    if finished:
        return Prepared(finished, was_finished=True)

    work = out / "work"
    units = _units(sources)
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with ProcessPoolExecutor(options.workers, mp_context=context, initializer=_start_worker, initargs=(done,)) as pool:
        reading = Progress("reading", sum(map(_disk_bytes, units)), done)
        announce = _announcement(options, units, given or vocab)
        jobs = [Job(unit, str(work), key, how, options.skip_bad) for unit in units]
        scans = _run_jobs(pool, _scan, jobs, reading, announce)
        left_out = _Losses(found.left_out, scans)
        chosen = _choose(scans, options.limit_mb, left_out)
        held_out = _held_out_groups(scans, chosen, options.held_out)
        tokenizer = given or _trained(work, key, units, scans, chosen, held_out, how, vocab)
        _write(work / "tokenizer.json", tokenizer.to_str())
        eod_id = tokenizer.token_to_id(eod)
        encode_key = _key([key, bpe.sha256(tokenizer), "every document is compared"])
        jobs = []
        for unit, scan, use in zip(units, scans, chosen, strict=True):
            # per document: 0 is left out, otherwise 1 + its index in SPLITS
            assignment = np.where(use, np.isin(scan["groups"], held_out).astype(np.uint8) + 1, 0).astype(np.uint8)
            _save(work / f"split_assignment_{unit.number:05d}.npy", assignment)
            jobs.append(Job(unit, str(work), encode_key, how, options.skip_bad, eod_id, options.on_changed))
        text_bytes = sum(int(scan["sizes"][use].sum()) for scan, use in zip(scans, chosen, strict=True))
        encoded = _run_jobs(pool, _encode_unit, jobs, Progress("encoding", text_bytes, done))
    for use, result in zip(chosen, encoded, strict=True):
        use[result["dropped"]] = False
    left_out.add_changed(encoded)
    _require_both_splits(encoded)
    manifest = _assemble(out, work, tokenizer, eod, units, encoded)
    manifest |= {
        "skipped": left_out.counts(),
        "skipped_names": left_out.names,
        "sources": _sources(units, scans, chosen),
        "key": key,
    }
    if options.on_changed == "keep":
        manifest["changed"] = _kept_changes(encoded)
    names = [name for result in encoded for name in result["splits"]["held_out"]["names"]]
    manifest["overlap"] = overlap_report(out, manifest, names)
    manifest["fingerprint"] = fingerprint_of(manifest)
    _write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(work)
    return Prepared(manifest, was_finished=False)


def _refused_by_disk(err: OSError, out: Path) -> str:
    """One line for an error of the file system, with its mend."""
    place, own = (Path(os.path.abspath(path)) for path in (err.filename or out, out))
    of_out = place == own or own in place.parents or place in own.parents
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        mend = "free some space and run the command again: it continues where it was"
    elif of_out and (err.errno in (errno.EACCES, errno.EPERM, errno.EROFS) or not os.path.isdir(out / "work")):
        mend = f"--out {printable(str(out))} must be a folder that can be written to; give another"
    else:
        mend = "mend it and run the command again: it continues where it was"
    return f"{printable(str(err.filename or out))}: {err.strerror or err}; {mend}"


def _given_tokenizer(path: Path, eod: str) -> Tokenizer:
    tokenizer = bpe.load(path)
    if tokenizer.token_to_id(eod) is None:
        raise PrepareError(f"--tokenizer {path} has no token {eod!r}; name its end-of-document token with --eod_token")
    if not bpe.is_end_token(tokenizer, eod):
        raise PrepareError(
            f"--eod_token {eod!r} is an ordinary token of {path}, which text may hold; name a special token, or mark "
            f"it as special there"
        )
    normalizer = bpe.normalizer_name(tokenizer)
    if normalizer is not None:
        print(
            f"{path} changes text before it encodes it (normaliser {normalizer}); each document is compared, see "
            f"--on_changed",
            flush=True,
        )
    return tokenizer


class _Losses:
    """Counts what was left out, by kind, and names the first few of each kind."""

    def __init__(self, found: Iterable[LeftOut], scans: list[dict]) -> None:
        self._count: Counter = Counter()
        self.names: dict[str, list[str]] = {}
        for item in found:
            self._count[item.kind] += 1
            if self._count[item.kind] <= NAMED:
                self.names.setdefault(item.kind, []).append(item.where)
        for scan in scans:
            self.add(json.loads(scan["bad"]), json.loads(scan.get("named", "{}")))

    def add(self, count: dict[str, int], names: dict[str, list[str]]) -> None:
        self._count.update(count)
        for kind, more in names.items():
            self.names[kind] = [*self.names.get(kind, []), *more][:NAMED]

    def add_changed(self, encoded: list[dict]) -> None:
        for result in encoded:
            if result["dropped"]:
                self.add({"changed": len(result["dropped"])}, {"changed": result["changed"]["names"]})

    def counts(self) -> dict[str, int]:
        return dict(sorted((+self._count).items()))


def _require_both_splits(encoded: list[dict]) -> None:
    for split in SPLITS:
        if not any(result["splits"][split]["tokens"] for result in encoded):
            raise PrepareError(
                f"no document is left in the {split} split, since the tokenizer changes them all; keep them with "
                f"--on_changed keep, or use another tokenizer"
            )


def _kept_changes(encoded: list[dict]) -> dict:
    """How many documents are kept as the tokenizer gives them back, their bytes before and after, and the first few."""
    changes = [result["changed"] for result in encoded]
    total = {name: sum(change[name] for change in changes) for name in ("documents", "bytes", "bytes_kept")}
    return total | {"names": [name for change in changes for name in change["names"]][:NAMED]}


def _announcement(
    options: PrepareOptions, units: list[Unit], tokenizer: Tokenizer | int
) -> Callable[[int, dict], bool]:
    """A function of the results of the first pass that prints how long the whole takes, once it can know."""
    sizes = [_disk_bytes(unit) for unit in units]

    def announce(number: int, scan: dict) -> bool:
        text_bytes, seconds = int(scan["sizes"].sum()), float(scan.get("seconds", 0.0))
        if sum(sizes) < ANNOUNCE_BYTES:
            return True
        if not text_bytes or not sizes[number]:
            return False
        sample, size = [], 0
        for _, item in _read_unit(units[number], options.reading):
            if isinstance(item, Document) and size < SAMPLE_BYTES:
                sample.append(item.text[: SAMPLE_BYTES - size])
                size += len(sample[-1])
            elif size >= SAMPLE_BYTES:
                break
        expansion = text_bytes / sizes[number]
        whole = sum(sizes) * expansion
        share = 1.0 if options.limit_mb is None else min(1.0, options.limit_mb * 1e6 / whole)
        line = estimate(
            sample,
            tokenizer,
            text_bytes=whole * share,
            largest_unit_bytes=max(sizes) * expansion * share,
            tokenizer_text_bytes=TOKENIZER_TEXT_BYTES,
            reading_s=seconds / sizes[number] * max(sum(sizes) / at_once(options.workers), max(sizes)),
            workers=options.workers,
        )
        print(line, flush=True)
        return True

    return announce


def summary(manifest: dict, out: Path) -> str:
    """The lines that prepare_data prints about a complete dataset."""
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    names = manifest.get("skipped_names", {})
    skipped = [f"{count} {kind}{_examples(count, names.get(kind))}" for kind, count in manifest["skipped"].items()]
    overlap = manifest["overlap"]
    return (
        f"{out}: {train['documents']:,} documents, {train['tokens']:,} tokens, {train['bytes'] / 1e6:.1f} MB, "
        f"{train['bytes'] / max(1, train['tokens'] - train['documents']):.2f} bytes per token\n"
        f"  held out: {held_out['documents']:,} documents, {held_out['tokens']:,} tokens, "
        f"{held_out['bytes'] / 1e6:.2f} MB; more than half of the 13-grams of {overlap['above_half']} of them also "
        f"occur in the training text\n"
        f"  left out: {', '.join(skipped) or 'nothing'}\n"
        f"{_changed_line(manifest.get('changed'))}"
        f"  vocabulary {manifest['vocab_size']:,}, {manifest['dtype']}, fingerprint {manifest['fingerprint'][:16]}"
    )


def _examples(count: int, names: list[str] | None) -> str:
    """ " (a, b and 3 more)", or nothing when there are no names."""
    if not names:
        return ""
    more = f" and {count - len(names):,} more" if count > len(names) else ""
    return f" ({', '.join(names)}{more})"


def _changed_line(changed: dict | None) -> str:
    if changed is None:
        return ""
    return (
        f"  kept as the tokenizer gives them back, since it changes them: {changed['documents']:,} of the documents"
        f"{_examples(changed['documents'], changed['names'])}; {changed['bytes']:,} bytes became "
        f"{changed['bytes_kept']:,}\n"
    )


def _input_key(options: PrepareOptions, vocab: int | None, given: Tokenizer | None, sources: list[Source]) -> str:
    """Names the input and the options that decide the files. Its content must not change: it is in every manifest."""
    decisive = {
        "code": CODE_VERSION,
        "reading": asdict(options.reading),
        "skip_bad": options.skip_bad,
        "held_out": options.held_out,
        "limit_mb": options.limit_mb,
        "vocab_size": vocab,
        "tokenizer": bpe.sha256(given) if given else None,
        "eod": options.eod_token,
    }
    if options.on_changed != "error":
        decisive["on_changed"] = options.on_changed
    return _key([decisive, [_stamp(source) for source in sources]])


def _finished(out: Path, key: str, force: bool) -> dict | None:
    """The manifest of a complete dataset made from the same input; None when there is work to do.

    In that case `out` has a work folder, and what another dataset left there is removed. Raises PrepareError when the
    folder holds other files than those of a dataset or of unfinished work, whatever `force` says, and without `force`
    when it holds another dataset or a damaged one.
    """
    path, work = out / "manifest.json", out / "work"
    manifest = _manifest(path)
    if manifest is None and not (work / OWNED).exists() and any(_is_foreign(p) for p in out.rglob("*")):
        raise PrepareError(f"{out} holds other files, which a dataset might replace; give another --out")
    if manifest is None:
        work.mkdir(parents=True, exist_ok=True)
        (work / OWNED).touch()
        return None
    if manifest["key"] == key:
        damage = _damage(out)
        if damage is None:
            return manifest
        if not force:
            raise PrepareError(f"{out} was prepared from this input, but it is damaged: {damage}")
        print(f"making {out} again, since it is damaged: {damage}", flush=True)
    elif not force:
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


def _is_foreign(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(LEASE)


def _damage(out: Path) -> str | None:
    try:
        prove_dataset(out)
    except DataError as err:
        return str(err)
    return None


def _manifest(path: Path) -> dict | None:
    """The manifest of a dataset, or None. A manifest.json of another kind, such as a checkpoint's, does not count.

    Raises PrepareError for one that cannot be read in the folder of a dataset.
    """
    try:
        manifest = json.loads(read_small_file(path, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as err:
        if not is_dataset(path.parent):
            return None
        raise PrepareError(
            f"{path} is damaged ({getattr(err, 'strerror', None) or 'not JSON'}): restore it from a copy, or delete "
            f"{path.parent} and prepare the dataset again"
        ) from err
    whole = isinstance(manifest, dict) and {"key", "splits", "fingerprint"} <= manifest.keys()
    return manifest if whole else None


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


_done: Synchronized | None = None
"""In a worker: the bytes that all workers have finished in this pass."""


def _start_worker(done: Synchronized) -> None:
    global _done
    _done = done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the work is parallel over processes already
    parent = multiprocessing.parent_process()
    # workers outlive a parent that is killed, since they themselves hold open the queue that they wait on
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Counted:
    """Adds the bytes that this worker finished to those of all workers, now and then; the rest when it is left."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, size: int) -> None:
        self._bytes += size
        if self._bytes >= COUNT_BYTES:
            self._flush()

    def _flush(self) -> None:
        if _done is not None:
            with _done.get_lock():
                _done.value += self._bytes
        self._bytes = 0

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()


def _run_jobs(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], dict],
    jobs: list[Job],
    progress: Progress,
    announce: Callable[[int, dict], bool] = lambda number, result: True,
) -> list[dict]:
    """Results in the order of the jobs, while the progress is shown.

    announce: called with the number and result of one job after the other, until it returns True.
    Raises PrepareError for the first job, in that order, that met a bad document.
    """
    results, announced = [], False
    try:
        for future in [pool.submit(work, job) for job in jobs]:
            while wait([future], POLL_S).not_done:
                progress.show()
            result = future.result()
            if result["error"]:
                pool.shutdown(cancel_futures=True)
                raise PrepareError(result["error"])
            announced = announced or announce(len(results), result)
            results.append(result)
            progress.show()
    except BrokenProcessPool as err:
        raise WorkerKilled(
            f"a worker was killed while {progress.title} (out of memory?); run the command again to continue"
        ) from err
    finally:
        progress.close()
    return results


def _disk_bytes(unit: Unit) -> int:
    return sum(os.path.getsize(source.path) for source in unit.sources)


def _read_unit(unit: Unit, how: Reading) -> Iterator[tuple[Source, Document | BadRecord]]:
    for source in unit.sources:
        for item in read_documents(source, how):
            yield source, item


def _same_documents(unit: Unit, how: Reading, hashes: np.ndarray) -> Iterator[tuple[Document, bytes]]:
    """The documents of a unit and their UTF-8 bytes, as the first pass read them. hashes: what it found.

    Raises PrepareError when a file was changed since.
    """
    number, name = 0, unit.sources[0].name if unit.sources else ""
    for source, item in _read_unit(unit, how):
        if isinstance(item, Document):
            raw, name = item.text.encode(), source.name
            if number >= len(hashes) or _digest(raw) != hashes[number].tobytes():
                break
            yield item, raw
            number += 1
    else:
        if number == len(hashes):
            return
    raise PrepareError(f"{name} was changed while it was being prepared; run the command again")


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


# -- first pass: check and hash -----------------------------------------------------------------------


def _scan(job: Job) -> dict:
    """Hash, group, size and source of each document of a unit, and counts of the bad ones.

    Cached in work/scan_*.npz, unless a bad document ended it.
    """
    path = Path(job.work) / f"scan_{job.unit.number:05d}.npz"
    if cached := _cached(path, job.key):
        return cached
    began = time.perf_counter()
    hashes, groups, sizes, origin, bad, error = [], [], [], [], Counter(), ""
    named: dict[str, list[str]] = {}
    with _Counted() as counted:
        for number, source in enumerate(job.unit.sources):
            left = os.path.getsize(source.path)
            for item in read_documents(source, job.how):
                if isinstance(item, BadRecord):
                    bad[item.kind] += 1
                    if bad[item.kind] <= NAMED:
                        named.setdefault(item.kind, []).append(item.where)
                    error = "" if job.skip_bad else f"{item}. {LEAVE_OUT}"
                    if error:
                        break
                    continue
                raw = item.text.encode()
                digest = _digest(raw)
                hashes.append(digest)
                groups.append(digest[:8] if item.group is None else _group_hash(item.group))
                sizes.append(len(raw))
                origin.append(number)
                if not (known_suffix(source.path) or "").endswith((".gz", ".zst", ".parquet")):
                    counted.add(min(len(raw), left))
                    left -= min(len(raw), left)
            counted.add(left)
            if error:
                break
    result = {
        "hashes": np.frombuffer(b"".join(hashes), dtype=np.dtype("<u8")).reshape(-1, 2),
        "groups": np.frombuffer(b"".join(groups), dtype="<u8"),
        "sizes": np.asarray(sizes, np.int64),
        "origin": np.asarray(origin, np.int64),
        "bad": json.dumps(bad),
        "named": json.dumps(named),
        "seconds": time.perf_counter() - began,
        "error": error,
        "key": job.key,
    }
    if not error:
        _save(path, result)
    return result


def _group_hash(group: str) -> bytes:
    """A file's name may hold bytes that are not UTF-8, and a record's field half a surrogate pair."""
    return hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _cached(path: Path, key: str) -> dict | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        result = {name: file[name] if file[name].ndim else file[name].item() for name in file.files}
    return result if result["key"] == key else None


def _choose(scans: list[dict], limit_mb: float | None, left_out: _Losses) -> list[np.ndarray]:
    """Masks of the documents to use, per unit; the others are added to `left_out`.

    Of equal documents the first is used; under limit_mb, those of the lowest hash.
    """
    hashes = np.concatenate([scan["hashes"] for scan in scans])
    sizes = np.concatenate([scan["sizes"] for scan in scans])
    if not len(hashes):
        raise PrepareError(f"no document was found in the input (left out: {left_out.counts() or 'nothing'})")
    use = np.zeros(len(hashes), dtype=bool)
    # lexsort is stable: within equal hashes the first document stays first
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    use[order[np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])]] = True
    left_out.add({"duplicate": int((~use).sum())}, {})
    if limit_mb is not None:
        unique = order[use[order]]  # in the order of the hash: a random subset that is the same every time
        beyond = unique[np.cumsum(sizes[unique]) > limit_mb * 1e6]
        use[beyond] = False
        left_out.add({"beyond_limit_mb": len(beyond)}, {})
    bounds = np.cumsum([len(scan["sizes"]) for scan in scans])[:-1]
    return np.split(use, bounds)


def _held_out_groups(scans: list[dict], chosen: list[np.ndarray], share: float) -> np.ndarray:
    """Hashes of the groups that are held out: those whose keyed hash is below `share`.

    At least one group is held out, and at least one is not. Raises PrepareError when there are fewer than two.
    """
    groups = np.unique(np.concatenate([scan["groups"][use] for scan, use in zip(scans, chosen, strict=True)]))
    if len(groups) < 2:
        raise PrepareError(
            "all documents are of one group, so none can be held out; give more files, or name a --group_field"
        )
    keyed = np.array(
        [
            int.from_bytes(hashlib.blake2b(g.tobytes(), key=b"held-out 1", digest_size=8).digest(), "little")
            for g in groups
        ],
        dtype=np.uint64,
    )
    held_out = groups[keyed < np.uint64(min(share * 2.0**64, 2.0**64 - 2**12))]
    if len(held_out) == len(groups):
        held_out = groups[keyed != keyed.max()]
    return held_out if len(held_out) else groups[[int(keyed.argmin())]]


def _trained(
    work: Path,
    key: str,
    units: list[Unit],
    scans: list[dict],
    chosen: list[np.ndarray],
    held_out: np.ndarray,
    how: Reading,
    vocab: int,
) -> Tokenizer:
    """A tokenizer trained on at most TOKENIZER_TEXT_BYTES of training documents, those of the lowest hash."""
    path = work / f"trained_{key[:16]}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    usable = [use & ~np.isin(scan["groups"], held_out) for scan, use in zip(scans, chosen, strict=True)]
    sizes = np.concatenate([scan["sizes"][use] for scan, use in zip(scans, usable, strict=True)])
    first = np.concatenate([scan["hashes"][use, 0] for scan, use in zip(scans, usable, strict=True)])
    order = np.argsort(first, kind="stable")
    inside = order[np.cumsum(sizes[order]) <= TOKENIZER_TEXT_BYTES]
    limit = first[inside[-1]] if len(inside) else first[order[0]]

    def texts() -> Iterator[str]:
        for unit, scan, use in zip(units, scans, usable, strict=True):
            wanted = use & (scan["hashes"][:, 0] <= limit)
            if wanted.any():
                documents = _same_documents(unit, how, scan["hashes"])
                yield from (document.text for (document, _), want in zip(documents, wanted, strict=True) if want)

    print(f"training a byte-level BPE of {vocab} entries on {sizes[first <= limit].sum() / 1e6:.0f} MB", flush=True)
    tokenizer = bpe.train(texts(), vocab)
    _write(path, tokenizer.to_str())
    return tokenizer


# -- second pass: tokenise ----------------------------------------------------------------------------


def _encode_unit(job: Job) -> dict:
    """Writes the tokens and document ends of a unit's chosen documents, per split, into work/; its json is last."""
    work = Path(job.work)
    stem = f"unit_{job.unit.number:05d}"
    done = work / f"{stem}.json"
    if done.exists() and (result := json.loads(done.read_text()))["key"] == job.key:
        return result
    try:
        with ExitStack() as stack:
            files = {
                split: stack.enter_context(write_atomically(work / f"{stem}.{split}.bin", durable=True, unique=True))
                for split in SPLITS
            }
            result = _encode_documents(job, work, files)
    except PrepareError as err:
        return {"error": str(err), "key": job.key}
    for split in SPLITS:
        _save(work / f"{stem}.{split}.ends.npy", np.asarray(result["splits"][split].pop("ends"), np.int64))
    result |= {"error": "", "key": job.key}
    _write(done, json.dumps(result))
    return result


def _encode_documents(job: Job, work: Path, files: dict[str, BinaryIO]) -> dict:
    """Writes the tokens of each chosen document to the file of its split.

    Returns ends and counts per split, the indices of documents that were dropped since the tokenizer changes them, and
    counts of the changed ones. Raises PrepareError when a document cannot be encoded as requested.
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    assignment = np.load(work / f"split_assignment_{job.unit.number:05d}.npy")
    with np.load(work / f"scan_{job.unit.number:05d}.npz") as scan:
        documents = _same_documents(job.unit, job.how, scan["hashes"])
    pieces, sizes = bpe.pieces(tokenizer), bpe.token_bytes(tokenizer).astype(np.int64)
    dtype = np.dtype("<u2" if len(pieces) <= 1 << 16 else "<u4")
    splits = {split: {"names": [], "ends": [], "tokens": 0, "bytes": 0} for split in SPLITS}
    changed, dropped = {"documents": 0, "bytes": 0, "bytes_kept": 0, "names": []}, []
    with _Counted() as counted:
        for number, ((document, raw), choice) in enumerate(zip(documents, assignment, strict=True)):
            if not choice:
                continue
            counted.add(len(raw))
            found = bpe.encode(tokenizer, document.text)
            if max(found, default=0) >= len(pieces):
                # astype would wrap 70000 to 4464 without an error
                raise PrepareError(
                    f"{document.where}: token id {max(found)} is outside the vocabulary of {len(pieces)}"
                )
            ids = np.asarray([*found, job.eod_id], dtype=np.int64)
            size = int(sizes[ids[:-1]].sum())
            back = b"".join([pieces[i] for i in found])
            if back != raw or size != len(raw):
                if job.on_changed == "error":
                    raise PrepareError(_describe_change(document.where, raw, back))
                changed["documents"] += 1
                changed["bytes"] += len(raw)
                changed["names"] = [*changed["names"], document.where][:NAMED]
                if job.on_changed == "skip":
                    dropped.append(number)
                    continue
                changed["bytes_kept"] += size
            split = SPLITS[choice - 1]
            files[split].write(ids.astype(dtype).tobytes())
            entry = splits[split]
            entry["tokens"] += len(ids)
            entry["bytes"] += size
            entry["ends"].append(entry["tokens"])
            if split == "held_out":
                entry["names"].append(document.where)
    return {"splits": splits, "dropped": dropped, "changed": changed}


def _describe_change(where: str, raw: bytes, back: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(raw, back, strict=False)) if a != b), min(len(raw), len(back)))
    begin = max(0, at - 12)
    while begin < at and raw[begin] & 0xC0 == 0x80:  # not in the middle of a character
        begin += 1
    before, after = (ascii(text[begin : at + 12].decode(errors="replace").rstrip("\ufffd")) for text in (raw, back))
    return (
        f"{where}: the tokenizer does not give this text back: {before} becomes {after} (byte {at}). Use another "
        f"tokenizer, or leave such documents out with --on_changed skip, or keep them as the tokenizer gives them back "
        f"with --on_changed keep; both are counted"
    )


# -- assembly -----------------------------------------------------------------------------------------


def _assemble(out: Path, work: Path, tokenizer: Tokenizer, eod: str, units: list[Unit], encoded: list[dict]) -> dict:
    """Writes the shards, in the order of the units, and the tables; returns the manifest without its reports."""
    vocab = bpe.vocab_size(tokenizer)
    dtype = "uint16" if vocab <= 1 << 16 else "uint32"
    _write(out / "tokenizer.json", tokenizer.to_str())
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
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab,
        "eod_id": tokenizer.token_to_id(eod),
        "tokenizer_sha256": _sha256(out / "tokenizer.json"),
        "token_bytes_sha256": _sha256(out / "token_bytes.npy"),
        "token_counts_sha256": _sha256(out / "token_counts.npy"),
        "splits": splits,
    }


class _ShardWriter:
    """Appends whole documents to the shards of one split.

    A shard is closed before it would exceed SHARD_TOKENS; only a longer document makes a longer shard, of its own.
    """

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
                fits = 1  # a document larger than a shard has a shard to itself
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
        with write_atomically(path, durable=True, unique=True) as file:
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


def _sources(units: list[Unit], scans: list[dict], chosen: list[np.ndarray]) -> list[dict]:
    """Bytes, documents and sha256 of the chosen text by file, or by top folder when there are more than 200 files."""
    many = sum(len(unit.sources) for unit in units) > 200
    total: dict[str, list] = {}
    for unit, scan, use in zip(units, scans, chosen, strict=True):
        for i, source in enumerate(unit.sources):
            here = use & (scan["origin"] == i)
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


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with write_atomically(path, durable=True, unique=True) as file:
        file.write(text.encode())


def _save(path: Path, content: np.ndarray | dict) -> None:
    """Writes an array as .npy, or a dict of arrays as .npz."""
    with write_atomically(path, durable=True, unique=True) as file:
        np.savez(file, **content) if isinstance(content, dict) else np.save(file, content)
