"""Reads documents, one at a time, from text files of several formats and from the embedded corpus.

A document that cannot be used becomes a BadRecord that names file and record; the caller decides whether it ends the
preparation or is counted.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from training.config.exit_codes import ExitCode, Refusal

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

# zstandard is no longer a dependency; where it is installed, a dataset prepared before is still recognised as finished
EMBEDDED_ROOTS = (
    "torch",
    "deepspeed",
    "omegaconf",
    "pyyaml",
    "wandb",
    "numpy",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "zstandard",
    "tqdm",
)
LEFT_OUT = {
    "test",
    "tests",
    "testing",
    "_vendor",
    "vendor",
    "vendored",
    "_vendored",
    "third_party",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "_distutils",
    "lib2to3",
    "idle_test",
    "_test",
}
"""Folders left out of the embedded corpus: tests, and copies of text that is elsewhere."""

CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
"""Places where text may be cut, since every byte-level pre-tokeniser in use begins a new word there.

An empty line is no such place: GPT-2's pattern joins two line ends at the end of a text, and only there.
"""
UNBROKEN_CHARS = 1 << 20
"""The longest text without a place to cut. It is encoded at once, in about 200 bytes of memory per character."""


class PrepareError(Refusal):
    """Text that cannot be prepared as requested; the message names the file and what to do."""

    exit_code = ExitCode.REFUSED_INPUT


class WorkerKilled(PrepareError):
    """A process of the preparation was killed: no fault of its input."""

    exit_code = ExitCode.FAILED


class BadRecord(ValueError):
    """A document or file that cannot be used. kind: a short name under which it is counted. where: its name."""

    def __init__(self, kind: str, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.kind, self.where = kind, where


@dataclass(frozen=True)
class Source:
    """A file to read.

    name: its name in reports.
    group: the group of its documents, which stay in one split; None: each record decides its own.
    """

    path: str
    name: str
    group: str | None


@dataclass(frozen=True)
class Document:
    """where: file and record, for messages. group: decides the split; None: the text does."""

    text: str
    where: str
    group: str | None


@dataclass(frozen=True)
class Reading:
    """The field that holds the text, the field that names the group, and the size of the largest document.

    Field names and values are part of the key in every manifest: renaming one would make finished datasets unfinished.
    """

    text_field: str
    group_field: str | None
    max_document_bytes: int


# -- finding files ------------------------------------------------------------------------------------


def known_suffix(name: str) -> str | None:
    """The suffix of SUFFIXES that a file's name ends in, or None."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), None)


def printable(name: str) -> str:
    """A file's name for messages and reports: bytes that are not UTF-8, and control characters, are written \\xNN."""
    if name.isprintable():
        return name
    return "".join(f"\\x{ord(c) & 0xFF:02x}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)


def embedded_files() -> list[Source]:
    """The source text of the standard library and of this project's installed dependencies, sorted by name.

    A group is a package of the standard library, or the second level of a dependency (torch/nn), since a few
    packages hold most of the text.
    """
    sources = []
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).parts
        if not LEFT_OUT & set(parts[:-1]) and not parts[0].startswith("config-"):
            sources.append(Source(str(path), "/".join(("python", *parts)), f"python/{parts[0]}"))
    for name in sorted(_closure(EMBEDDED_ROOTS)):
        for file in metadata.distribution(name).files or ():
            parts = file.parts
            if file.suffix == ".py" and ".." not in parts and not LEFT_OUT & set(parts[:-1]):
                path = Path(str(file.locate()))
                if path.is_file():
                    sources.append(
                        Source(str(path), "/".join(parts), "/".join(parts[:2]) if len(parts) > 2 else parts[0])
                    )
    unique = {source.name: source for source in sources}
    return [unique[name] for name in sorted(unique)]


def _closure(roots: tuple[str, ...]) -> set[str]:
    """The installed ones among `roots` and their dependencies, without extras."""
    wanted, seen = [re.sub(r"[-_.]+", "-", root).lower() for root in roots], set()
    while wanted:
        name = wanted.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in seen:
            continue
        seen.add(name)
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                wanted.append(re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower())
    return seen


# -- reading ------------------------------------------------------------------------------------------


def read_documents(source: Source, how: Reading) -> Iterator[Document | BadRecord]:
    """The documents of one file, in order, in bounded memory; a BadRecord in place of one that cannot be used.

    When a file is truncated or damaged, its last item is a BadRecord.
    """
    suffix = known_suffix(source.path) or ".txt"
    try:
        if suffix == ".parquet":
            yield from _read_parquet(source, how)
        elif suffix.startswith(".jsonl"):
            with _open(source.path, suffix) as file:
                yield from _read_jsonl(source, how, file)
        else:
            yield _read_text(source, how)
    except (EOFError, OSError, gzip.BadGzipFile) as err:
        yield BadRecord("unreadable", source.name, f"truncated or unreadable ({type(err).__name__}: {err})")


def _open(path: str, suffix: str) -> BinaryIO:
    """Opens a file for reading its decompressed lines.

    Truncated or damaged content raises OSError or EOFError, here or in a read.
    """
    if not suffix.endswith((".gz", ".zst")):
        return open(path, "rb")
    if not os.path.getsize(path):  # both readers take this for the end of the text, but no compressor writes it
        raise EOFError("the file has 0 bytes")
    if suffix.endswith(".gz"):
        return gzip.open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


def _decode(raw: bytes, where: str) -> str | BadRecord:
    """The text of UTF-8 bytes without a byte-order mark; a BadRecord when it is empty or not text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        return BadRecord("invalid_utf8", where, f"not UTF-8 (byte {err.start})")
    return _usable(text, where)


def _usable(text: str, where: str) -> str | BadRecord:
    if not text.strip():
        return BadRecord("empty", where, "empty document")
    if "\0" in text:
        return BadRecord("binary", where, "holds NUL characters, so it is not text")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return BadRecord(
            "lone_surrogate", where, f"half of a surrogate pair at character {err.start}, so it is not Unicode text"
        )
    if len(text) > UNBROKEN_CHARS and _longest_uncut(text) > UNBROKEN_CHARS:
        return BadRecord(
            "unbroken", where, f"more than {UNBROKEN_CHARS:,} characters without a space or line end to cut at"
        )
    return text


def _longest_uncut(text: str) -> int:
    longest = begin = 0
    for cut in CUT.finditer(text):
        longest, begin = max(longest, cut.start() - begin), cut.start()
    return max(longest, len(text) - begin)


def _read_text(source: Source, how: Reading) -> Document | BadRecord:
    if Path(source.path).stat().st_size > how.max_document_bytes:
        return _too_long(source.name, how)
    text = _decode(Path(source.path).read_bytes(), source.name)
    return text if isinstance(text, BadRecord) else Document(text, source.name, source.group)


def _too_long(where: str, how: Reading) -> BadRecord:
    return BadRecord(
        "too_long",
        where,
        f"document of more than {how.max_document_bytes >> 20} MiB; split it, or raise --max_document_mb",
    )


def _read_jsonl(source: Source, how: Reading, file: BinaryIO) -> Iterator[Document | BadRecord]:
    number = blank = 0
    # a longer line is read in blocks and dropped, so that the limit bounds the memory
    while line := file.readline(how.max_document_bytes + 1):
        number += 1
        if not line.strip() and len(line) <= how.max_document_bytes:
            blank += 1  # blank lines at the end of the file are no records
            continue
        for empty in range(number - blank, number):
            yield BadRecord("empty", f"{source.name}, line {empty}", "empty line")
        blank = 0
        where = f"{source.name}, line {number}"
        if len(line) > how.max_document_bytes:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield _too_long(where, how)
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as err:
            yield BadRecord("invalid_utf8", where, f"not UTF-8 (byte {err.start})")
        except (ValueError, RecursionError) as err:
            yield BadRecord("bad_json", where, f"not JSON ({err})")
        else:
            yield _from_record(record, where, how)


def _from_record(record: object, where: str, how: Reading) -> Document | BadRecord:
    if not isinstance(record, dict):
        what = f"{_JSON_NAMES[type(record)]}, not an object with named fields; write one object per line"
        return BadRecord("missing_field", where, f"this line holds {what}")
    found = record.get(how.text_field)
    if found is None:
        has = "it is null" if how.text_field in record else f"it has {', '.join(list(record)[:8]) or 'no field'}"
        return BadRecord("missing_field", where, f"no text in field {how.text_field!r} ({has}); see --text_field")
    if not isinstance(found, str):
        what = _JSON_NAMES.get(type(found), type(found).__name__)
        return BadRecord(
            "not_text", where, f"field {how.text_field!r} holds {what}, not text; convert it, or see --text_field"
        )
    group = None
    if how.group_field is not None:
        if record.get(how.group_field) is None:
            return BadRecord("missing_field", where, f"no group field {how.group_field!r}; see --group_field")
        group = str(record[how.group_field])
    text = _usable(found, where)
    return text if isinstance(text, BadRecord) else Document(text, where, group)


_JSON_NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    bytes: "bytes (a binary column)",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""What a value of a record is called in a message."""


def _read_parquet(source: Source, how: Reading) -> Iterator[Document | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    columns = [how.text_field] + ([how.group_field] if how.group_field else [])
    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        missing = [c for c in columns if c not in file.schema_arrow.names]
        if missing:
            has = ", ".join(file.schema_arrow.names)
            yield BadRecord("missing_field", source.name, f"no column {missing[0]!r} (it has {has}); see --text_field")
            return
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for i in range(batch.num_rows):
                row += 1
                where = f"{source.name}, row {row}"
                try:
                    record = {name: batch.column(name)[i].as_py() for name in columns}
                except UnicodeDecodeError as err:
                    yield BadRecord("invalid_utf8", where, f"not UTF-8 (byte {err.start})")
                    continue
                text = record[how.text_field]
                if isinstance(text, str) and len(text.encode("utf-8", "surrogatepass")) > how.max_document_bytes:
                    yield _too_long(where, how)
                else:
                    yield _from_record(record, where, how)
    except pyarrow.ArrowException as err:
        yield BadRecord("unreadable", source.name, f"truncated or damaged parquet ({str(err).splitlines()[0]})")
