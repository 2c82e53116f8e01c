"""From text to shards: nothing is lost without a message, and neither workers nor kills change the result."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launching import ROOT, rank_environment
from support.permissions import permissions_apply
from tokenizers import AddedToken, Tokenizer, normalizers

from training import prepare_data, verify
from training.config import load_config
from training.config.command import run_command
from training.data import corpus, pace, prepare
from training.data import tokenizer as bpe
from training.data.corpus import BadRecord, Document, PrepareError, Reading, Source, read_documents
from training.data.dataset import DataError, PackedTokens

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix odd potions at noon".split()


def prose(seed: int, words: int = 120) -> str:
    random = np.random.Generator(np.random.PCG64(seed))
    return " ".join(random.choice(WORDS, words)) + f" — nº {seed}.\n"


def prepare_texts(out: Path, *argv: str, vocab: int | None = 300, workers: int = 1) -> int:
    """Runs the command; returns its exit code."""
    size = ["--vocab_size", str(vocab)] if vocab else []
    options = ["--out", str(out), "--held_out", "0.2", "--workers", str(workers), *size]
    return run_command(prepare_data.main, [*options, *argv])


def folder_of_texts(folder: Path, count: int = 12, **kwargs) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"t{i:02d}.txt").write_text(prose(i, **kwargs))
    return folder


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def documents(out: Path, split: str) -> list[str]:
    """The decoded documents of a split."""
    m, tokenizer = manifest(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = []
    for shard in m["splits"][split]["shards"]:
        path = out / shard["file"]
        tokens = np.fromfile(path, dtype=m["dtype"])
        ends = np.load(path.with_name(path.stem + ".ends.npy"))
        for part in np.split(tokens, ends[:-1]) if len(ends) else []:
            assert part[-1] == m["eod_id"]
            texts.append(tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False))
    return texts


def tree(out: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by relative path."""
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("p")
    assert prepare_texts(base / "out", str(folder_of_texts(base / "in"))) == 0
    return base / "out"


def test_every_text_is_whole_in_one_split(prepared):
    train, held = documents(prepared, "train"), documents(prepared, "held_out")
    assert sorted(train + held) == sorted(prose(i) for i in range(12))
    assert 0 < len(held) < 6


def test_the_manifest_agrees_with_the_files(prepared):
    m = manifest(prepared)
    for split in ("train", "held_out"):
        entry = m["splits"][split]
        for shard in entry["shards"]:
            path = prepared / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
            assert path.stat().st_size == shard["tokens"] * 2
        assert entry["bytes"] == sum(len(text.encode()) for text in documents(prepared, split))
        assert entry["documents"] == len(documents(prepared, split))
    assert (m["dtype"], m["vocab_size"], m["eod_id"]) == ("uint16", 300, 0)
    assert m["tokenizer_sha256"] == hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest()
    assert not (prepared / "work").exists()


def test_counts_and_bytes_per_token_are_exact(prepared):
    m = manifest(prepared)
    sizes, counts = np.load(prepared / "token_bytes.npy"), np.load(prepared / "token_counts.npy")
    assert counts.sum() == m["splits"]["train"]["tokens"]
    assert int((sizes.astype(np.int64) * counts).sum()) == m["splits"]["train"]["bytes"]
    assert sizes[m["eod_id"]] == 0


def test_packed_tokens_reads_the_dataset(prepared):
    data = PackedTokens({str(prepared): 1.0}, split="train", max_seq_len=64, seed=0)
    data.verify()
    assert data.n_targets(0, data.n_windows) == manifest(prepared)["splits"]["train"]["tokens"] - len(
        documents(prepared, "train")
    )


def test_a_second_run_does_nothing_and_other_input_is_refused(prepared, capsys):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    source = prepared.parent / "in"
    assert prepare_texts(prepared, str(source)) == 0
    assert "is prepared already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before
    assert prepare_texts(prepared, str(source), vocab=301) == 3
    assert "made from other input or options" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before


@pytest.fixture
def own(prepared, tmp_path) -> tuple[Path, str]:
    """A copy of the prepared dataset, and its input."""
    out = shutil.copytree(prepared, tmp_path / "own", ignore=shutil.ignore_patterns("packed"))
    return out, str(prepared.parent / "in")


DAMAGE = ["manifest.json", "tokenizer.json", "token_bytes.npy", "token_counts.npy", "train/shard_00000.bin"]
DAMAGE += ["held_out/shard_00000.bin", "held_out/shard_00000.ends.npy"]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_dataset_is_not_called_prepared(own, name, capsys):
    out, source = own
    good = tree(out)
    raw = (out / name).read_bytes()
    (out / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if name != "manifest.json" else raw[:-9])
    for command in (lambda: prepare_texts(out, source), lambda: prepare_texts(out, "--verify", vocab=None)):
        assert command() == 3
        said = capsys.readouterr()
        assert str(out / name) in said.err + said.out and "restore" in said.err + said.out
        assert "is prepared already" not in said.out
    assert run_command(verify.main, [str(out)]) == 3
    assert str(out / name) in capsys.readouterr().out
    if name != "train/shard_00000.bin":
        return
    assert prepare_texts(out, source, "--force") == 0
    assert "since it is damaged" in capsys.readouterr().out
    assert tree(out) == good


def test_a_good_dataset_is_proved_and_nothing_is_changed(own, capsys):
    out, source = own
    before = tree(out)
    for command in (lambda: prepare_texts(out, "--verify", vocab=None), lambda: run_command(verify.main, [str(out)])):
        assert command() == 0
        said = capsys.readouterr().out
        assert "train: 1 shards" in said and "as it was prepared" in said and "warning" not in said
    assert tree(out) == before
    with pytest.raises(SystemExit):
        prepare_texts(out, "--verify", source)


def test_token_bytes_that_are_not_of_the_tokenizer_are_refused_though_every_hash_agrees(own, capsys):
    out, _ = own
    sizes = np.load(out / "token_bytes.npy")
    np.save(out / "token_bytes.npy", sizes * np.uint16(10))
    changed = manifest(out) | {"token_bytes_sha256": tree(out)["token_bytes.npy"]}
    (out / "manifest.json").write_text(json.dumps(changed))
    assert run_command(verify.main, [str(out)]) == 3
    assert "token_bytes.npy is not of" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"token_bytes\.npy is not of .*tokenizer\.json, so bits per byte would be wrong"
    ):
        PackedTokens({str(out): 1.0}, split="train", max_seq_len=64, seed=0).require_true_token_bytes()


def test_golden_key_of_the_input(tmp_path, monkeypatch):
    """If this fails, every finished dataset is refused as made from other input. Do not update it; fix the code."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        path = tmp_path / f"in/t{i:02d}.txt"
        path.write_text(f"document {i}\n")
        os.utime(path, ns=(0, 10**9 * i))
    monkeypatch.chdir(tmp_path)
    assert prepare_texts(Path("out"), "in") == 0
    assert manifest(Path("out"))["key"] == "ef28e7dd81fb7f9a5c48ae50644b769de346ed11634fe47eb0d87a2a844ed60a"


def test_force_replaces_a_dataset(tmp_path):
    source = folder_of_texts(tmp_path / "in")
    assert prepare_texts(tmp_path / "out", str(source)) == 0
    first = manifest(tmp_path / "out")["fingerprint"]
    (source / "t00.txt").write_text("something else altogether\n")
    assert prepare_texts(tmp_path / "out", str(source)) == 3
    assert prepare_texts(tmp_path / "out", str(source), "--force") == 0
    assert manifest(tmp_path / "out")["fingerprint"] != first


# -- formats ----------------------------------------------------------------------------------------------


def lines(records: list) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(raw: bytes) -> bytes:
    """One frame."""
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def test_all_formats_give_the_same_documents(tmp_path):
    texts = [prose(i) for i in range(10)]
    records = [{"body": text, "work": i % 5} for i, text in enumerate(texts)]
    raw = lines(records)
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(raw[:900]) + zstd(raw[900:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    results = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        out = tmp_path / f"out_{name}"
        assert prepare_texts(out, str(tmp_path / name), "--text_field", "body", "--group_field", "work") == 0
        results.append((documents(out, "train"), documents(out, "held_out")))
        assert sorted(results[-1][0] + results[-1][1]) == sorted(texts)
    assert results.count(results[0]) == 4
    groups = [{texts.index(text) % 5 for text in split} for split in results[0]]
    assert groups[0].isdisjoint(groups[1]) and groups[1]


def test_folders_globs_and_markdown(tmp_path):
    source = folder_of_texts(tmp_path / "in" / "deep")
    (tmp_path / "in" / "note.md").write_text("# A note\n" + prose(50))
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    assert prepare_texts(tmp_path / "out", str(tmp_path / "in")) == 0
    assert len(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out")) == 13
    assert prepare_texts(tmp_path / "glob", str(source / "t0*.txt")) == 0
    assert len(documents(tmp_path / "glob", "train") + documents(tmp_path / "glob", "held_out")) == 10


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere"], "nowhere: no such file, and as a glob no file"),
        (["{in}/picture.png"], "picture.png: unknown kind of file"),
        (["{in}/empty"], "no file ending in .txt"),
        (["{in}/one.txt"], "all documents are of one group"),
        (["{in}/one.txt", "--tokenizer", "{in}/one.txt"], "one.txt: cannot be read"),
        (["{in}/one.txt", "--tokenizer", "{in}/x.tiktoken"], "not a tiktoken rank file"),
    ],
)
def test_unusable_input_is_refused(tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "one.txt").write_text("one")
    argv = [word.format(**{"in": tmp_path}) for word in argv]
    vocab = None if "--tokenizer" in argv else 300
    assert prepare_texts(tmp_path / "out", *argv, vocab=vocab) == 3
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--embedded", "x.txt"],
        ["x.txt", "--tokenizer", "t", "--vocab_size", "9"],
        ["x.txt", "--held_out", "1"],
        ["x.txt", "--held_out", "nan"],
        ["x.txt", "--limit_mb", "nan"],
        ["x.txt", "--workers", "0"],
        ["x.txt", "--workers", "100000"],
        ["x.txt", "--max_document_mb", "0"],
        ["x.txt", "--max_document_mb", str(1 << 70)],
        ["x.txt", "--vocab_size", "100"],
        ["x.txt", "--vocab_size", "0"],
        ["x.txt", "--vocab_size", "-5"],
        ["x.txt", "--vocab_size", str(1 << 40)],
        ["x.txt", "--eod_token", "</s>"],
        ["x.txt", "--on_changed", "maybe"],
    ],
)
def test_impossible_arguments_are_refused(argv):
    with pytest.raises(SystemExit) as caught:
        prepare_data.main(["--out", "o", *argv])
    assert caught.value.code == 2


# -- bad records ------------------------------------------------------------------------------------------

GOOD = [{"text": prose(i)} for i in range(8)]
BAD = {
    "empty document": (
        "a.jsonl",
        lines(GOOD[:2] + [{"text": "  \n"}] + GOOD[2:]),
        "a.jsonl, line 3: empty document",
        "empty",
    ),
    "empty line": ("a.jsonl", lines(GOOD[:2]) + b"\n" + lines(GOOD[2:]), "a.jsonl, line 3: empty line", "empty"),
    "invalid UTF-8": (
        "a.jsonl",
        lines(GOOD[:1]) + b'{"text": "\xff\xfe"}\n' + lines(GOOD[1:]),
        "a.jsonl, line 2: not UTF-8",
        "invalid_utf8",
    ),
    "bad JSON": (
        "a.jsonl",
        lines(GOOD[:1]) + b'{"text": \n' + lines(GOOD[1:]),
        "a.jsonl, line 2: not JSON",
        "bad_json",
    ),
    "missing field": (
        "a.jsonl",
        lines([{"body": "x"}, *GOOD]),
        "a.jsonl, line 1: no text in field 'text' (it has body)",
        "missing_field",
    ),
    "a number as text": (
        "a.jsonl",
        lines([{"text": 5}, *GOOD]),
        "a.jsonl, line 1: field 'text' holds a number, not text",
        "not_text",
    ),
    "null as text": (
        "a.jsonl",
        lines([{"text": None}, *GOOD]),
        "a.jsonl, line 1: no text in field 'text' (it is null)",
        "missing_field",
    ),
    "half a surrogate": (
        "a.jsonl",
        b'{"text": "a\\ud800"}\n' + lines(GOOD),
        "a.jsonl, line 1: half of a surrogate pair",
        "lone_surrogate",
    ),
    "binary": ("a.jsonl", b'{"text": "a\\u0000"}\n' + lines(GOOD), "a.jsonl, line 1: holds NUL", "binary"),
    "too long a line": (
        "a.jsonl",
        lines(GOOD[:2] + [{"text": "x" * (1 << 20)}] + GOOD[2:]),
        "a.jsonl, line 3: document of more than 1 MiB",
        "too_long",
    ),
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(lines(GOOD * 40), mtime=0)[:-40],
        "a.jsonl.gz: truncated or unreadable",
        "unreadable",
    ),
    "truncated zstd": (
        "a.jsonl.zst",
        zstd(lines(GOOD * 40))[:-40],
        "a.jsonl.zst: truncated or unreadable",
        "unreadable",
    ),
    "not gzip": ("a.jsonl.gz", lines(GOOD), "a.jsonl.gz: truncated or unreadable", "unreadable"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_counted(tmp_path, capsys, name):
    file, content, words, kind = BAD[name]
    source = folder_of_texts(tmp_path / "in", 3)
    (source / file).write_bytes(content)
    argv = (str(source), "--max_document_mb", "1")
    assert prepare_texts(tmp_path / "out", *argv) == 3
    message = capsys.readouterr().err
    assert words in message and "--on_bad skip" in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare_texts(tmp_path / "out", *argv, "--on_bad", "skip") == 0
    assert f"1 {kind}" in capsys.readouterr().out
    assert manifest(tmp_path / "out")["skipped"][kind] == 1
    found = set(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out"))
    assert {prose(i) for i in range(3)} <= found
    if kind != "unreadable":
        assert {record["text"] for record in GOOD} <= found


@pytest.mark.parametrize("suffix, compress", [(".gz", lambda raw: gzip.compress(raw, mtime=0)), (".zst", zstd)])
def test_a_compressed_file_that_ends_anywhere_too_early_is_unreadable(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    first = compress(lines(GOOD[:5]))
    whole = first + compress(lines(GOOD[5:]))
    how = Reading("text", None, 1 << 20)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        *before, last = read_documents(Source(str(path), path.name, None), how)
        assert all(isinstance(item, Document) for item in before)
        complete = size in (len(first), len(whole))  # a cut between two members leaves a complete file
        assert isinstance(last, Document) == complete, f"{size} of {len(whole)} bytes"
        if not complete:
            assert last.kind == "unreadable" and f"{path.name}: truncated or unreadable" in str(last)
    assert len(before) + 1 == len(GOOD)


def test_truncated_parquet_and_missing_column(tmp_path, capsys):
    source = folder_of_texts(tmp_path / "in", 3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), source / "p.parquet")
    raw = (source / "p.parquet").read_bytes()
    (source / "p.parquet").write_bytes(raw[:-20])
    assert prepare_texts(tmp_path / "out", str(source)) == 3
    assert "p.parquet: truncated or damaged parquet" in capsys.readouterr().err
    (source / "p.parquet").write_bytes(raw)
    assert prepare_texts(tmp_path / "out", str(source), "--text_field", "body") == 3
    assert "p.parquet: no column 'body' (it has text)" in capsys.readouterr().err


@pytest.mark.parametrize("suffix, peak_mib", [(".jsonl", 80), (".jsonl.zst", 110)])  # importing pyarrow takes the rest
def test_a_200_mb_line_costs_little_memory(tmp_path, suffix, peak_mib):
    path = tmp_path / f"long{suffix}"
    with open(path, "wb") if suffix == ".jsonl" else pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + lines(GOOD))
    script = (
        "import re, sys; from training.data.corpus import *; how = Reading('text', None, 8 << 20)\n"
        "kinds = [getattr(d, 'kind', 'ok') for d in read_documents(Source(sys.argv[1], 'long', None), how)]\n"
        "print(kinds, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
    )
    kinds, _, peak = done.stdout.rpartition(" ")
    assert kinds == str(["too_long"] + ["ok"] * 8), done.stderr
    assert int(peak) < peak_mib


def test_a_text_file_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "long.txt"
    with open(path, "wb") as file:
        file.truncate(200 << 20)
    (item,) = read_documents(Source(str(path), "long.txt", "g"), Reading("text", None, 64 << 20))
    assert isinstance(item, BadRecord) and "long.txt: document of more than 64 MiB" in str(item)


def test_the_workers_import_no_torch():
    """Each of them would take a second and 200 MB more."""
    program = "import sys, training.prepare_data; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kebab_case_flags_of_earlier_versions_still_work(tmp_path, capsys):
    argv = ["--out", str(tmp_path / "out"), "--held-out", "0.2", "--vocab-size=300", "--workers", "1", "--on-bad=skip"]
    assert run_command(prepare_data.main, [*argv, str(folder_of_texts(tmp_path / "in"))]) == 0
    assert manifest(tmp_path / "out")["vocab_size"] == 300


def test_the_command_runs_as_a_script_where_the_project_is_not_installed():
    # -S leaves out the .pth file of an installation; the libraries are found by PYTHONPATH
    environment = rank_environment() | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [sys.executable, "-S", "training/prepare_data.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m training.prepare_data"), done.stderr


def test_a_token_outside_the_vocabulary_is_refused_not_wrapped(tmp_path, monkeypatch, prepared):
    work = tmp_path / "work"
    work.mkdir()
    (work / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    np.save(work / "split_assignment_00000.npy", np.ones(1, np.uint8))
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr(bpe, "encode", lambda tokenizer, text: [70000])
    unit = prepare.Unit(0, (Source(str(tmp_path / "a.txt"), "a.txt", "a.txt"),))
    job = prepare.Job(unit, str(work), "k", Reading("text", None, 1 << 20), False, 0)
    prepare._scan(job)
    result = prepare._encode_unit(job)
    assert result["error"] == "a.txt: token id 70000 is outside the vocabulary of 300"


# -- duplicates, splits, overlap --------------------------------------------------------------------------


def test_equal_documents_are_used_once_across_files(tmp_path):
    source = folder_of_texts(tmp_path / "in", 6)
    (source / "copy.txt").write_text(prose(2))
    (source / "more.jsonl").write_bytes(lines([{"text": prose(3)}, {"text": prose(4)}, {"text": prose(90)}]))
    assert prepare_texts(tmp_path / "out", str(source)) == 0
    assert manifest(tmp_path / "out")["skipped"] == {"duplicate": 3}
    assert len(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out")) == 7


def test_a_copy_of_held_out_text_is_in_the_overlap_report(tmp_path):
    source = folder_of_texts(tmp_path / "in", 12)
    assert prepare_texts(tmp_path / "out", str(source)) == 0
    assert manifest(tmp_path / "out")["overlap"]["above_half"] == 0
    held = documents(tmp_path / "out", "held_out")[0]
    name = next(p for p in source.iterdir() if p.read_text() == held).name
    train = next(p for p in sorted(source.iterdir()) if p.read_text() in documents(tmp_path / "out", "train"))
    train.write_text(train.read_text() + held + "and one more thing\n")
    assert prepare_texts(tmp_path / "again", str(source)) == 0
    overlap = manifest(tmp_path / "again")["overlap"]
    assert (
        overlap["above_half"] == 1
        and overlap["worst"][0]["document"].endswith(name)
        and overlap["worst"][0]["share"] > 0.9
    )


def test_a_limit_chooses_the_same_subset_every_time(tmp_path):
    source = folder_of_texts(tmp_path / "in", 40)
    whole = sum(p.stat().st_size for p in source.iterdir())
    for out in ("a", "b"):
        assert prepare_texts(tmp_path / out, str(source), "--limit_mb", str(whole / 2e6)) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    splits = manifest(tmp_path / "a")["splits"]
    assert 0.3 * whole < splits["train"]["bytes"] + splits["held_out"]["bytes"] <= 0.5 * whole
    assert manifest(tmp_path / "a")["skipped"]["beyond_limit_mb"] > 10


# -- determinism and kills --------------------------------------------------------------------------------


@pytest.fixture
def many_units(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 2000)
    return folder_of_texts(tmp_path / "in", 24)


def test_the_number_of_workers_changes_no_byte(tmp_path, many_units):
    for workers in (1, 3):
        assert prepare_texts(tmp_path / f"w{workers}", str(many_units), workers=workers) == 0
    assert tree(tmp_path / "w1") == tree(tmp_path / "w3")


def test_shards_are_cut_between_documents(tmp_path, many_units, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 500)
    assert prepare_texts(tmp_path / "out", str(many_units)) == 0
    shards = manifest(tmp_path / "out")["splits"]["train"]["shards"]
    assert len(shards) > 3 and all(shard["tokens"] <= 500 for shard in shards)
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out")) == sorted(
        prose(i) for i in range(24)
    )


SLOW = """
import sys, time
from training import prepare_data
from training.data import prepare

def run_jobs(pool, work, jobs, progress, announce=None):
    results = []
    for job in jobs:
        results.append(work(job))
        time.sleep(1.0 if progress.title == "encoding" else 0)
    return results

if __name__ == "__main__":
    prepare.UNIT_BYTES = 2000
    prepare._run_jobs = run_jobs
    sys.exit(prepare_data.main(sys.argv[1:]))
"""


def test_a_killed_preparation_continues_where_it_was_and_a_living_one_owns_its_folder(tmp_path, many_units, capsys):
    argv = [
        "--out",
        str(tmp_path / "killed"),
        "--held_out",
        "0.2",
        "--vocab_size",
        "300",
        "--workers",
        "1",
        str(many_units),
    ]
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(script), *argv], cwd=ROOT, env=rank_environment(), start_new_session=True
    )
    work = tmp_path / "killed" / "work"
    deadline = time.monotonic() + 60
    while len(list(work.glob("unit_*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert (
        run_command(prepare_data.main, argv) == 2
    )  # two in one folder once sealed a shard half of whose tokens were 0
    assert f"killed is in use by training.prepare_data (pid {process.pid} on " in capsys.readouterr().err
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {
        p: p.stat().st_mtime_ns for p in work.glob("unit_*.bin") if p.with_name(p.name.split(".")[0] + ".json").exists()
    }
    assert 3 <= len({p.name.split(".")[0] for p in done}) < 12
    (work / "unit_00011.train.bin.tmp").write_bytes(b"half")  # what a kill in the middle of a write leaves
    assembled = []
    real = prepare._assemble

    def record_times(*args):
        assembled.append({p: p.stat().st_mtime_ns for p in done})
        return real(*args)

    prepare._assemble = record_times
    try:
        assert prepare_data.main(argv) == 0
    finally:
        prepare._assemble = real
    assert assembled == [done]  # finished units were not encoded again
    assert prepare_texts(tmp_path / "whole", str(many_units)) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


# -- the tokenizer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_bpe() -> Tokenizer:
    return bpe.train([prose(i) for i in range(30)] + ["def f(x):\n    return x\n\n\n" * 20], 400)


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=st.sampled_from(list("ab é日 \n\t.,'s1\u3000\r")), max_size=300), size=st.integers(1, 40))
def test_cutting_long_text_changes_no_token(small_bpe, text, size):
    whole = small_bpe.encode(text, add_special_tokens=False).ids
    assert [
        i for chunk in bpe.chunks(text, size) for i in small_bpe.encode(chunk, add_special_tokens=False).ids
    ] == whole


def test_the_spelling_of_a_special_token_in_a_text_is_text(small_bpe):
    ids = bpe.encode(small_bpe, f"before {bpe.EOD} after")
    assert small_bpe.token_to_id(bpe.EOD) not in ids
    assert small_bpe.decode(ids) == f"before {bpe.EOD} after"


def test_bytes_per_token_add_up(small_bpe):
    sizes = bpe.token_bytes(small_bpe)
    for text in (prose(3), "日本語 ünïcode \U0001f600", "\t\n  x"):
        assert int(sizes[bpe.encode(small_bpe, text)].astype(int).sum()) == len(text.encode())


def test_a_large_vocabulary_takes_four_bytes_and_a_given_tokenizer_is_used(tmp_path, small_bpe):
    big = json.loads(small_bpe.to_str())
    big["model"]["vocab"] |= {f"unused{i}": i for i in range(400, 65538)}
    (tmp_path / "big.json").write_text(json.dumps(big))
    source = folder_of_texts(tmp_path / "in", 6)
    assert prepare_texts(tmp_path / "out", str(source), "--tokenizer", str(tmp_path / "big.json"), vocab=None) == 0
    m = manifest(tmp_path / "out")
    assert (m["dtype"], m["vocab_size"]) == ("uint32", 65538)
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out")) == sorted(
        prose(i) for i in range(6)
    )


def test_an_unsuitable_tokenizer_is_refused(tmp_path, small_bpe):
    path = tmp_path / "t.json"
    broken = json.loads(small_bpe.to_str())
    path.write_text(json.dumps(broken | {"decoder": None}))
    with pytest.raises(PrepareError, match="not a byte-level BPE"):
        bpe.load(path)
    with pytest.raises(PrepareError, match="below 257"):
        bpe.train(["x"], 100)


def test_a_tiktoken_rank_file_becomes_the_same_tokenizer(tmp_path):
    """The ranks are as in Qwen2.5's file: the bytes, then merges in order."""
    import base64

    words = [bytes([b]) for b in range(256)] + [b"th", b"he", b"the", b" the", b"in", b"ing"]
    (tmp_path / "q.tiktoken").write_bytes(b"".join(base64.b64encode(w) + b" %d\n" % i for i, w in enumerate(words)))
    tokenizer = bpe.load(tmp_path / "q.tiktoken")
    ids = bpe.encode(tokenizer, "the thing the")
    assert [words[i] for i in ids] == [b"the", b" ", b"th", b"ing", b" the"] or tokenizer.decode(ids) == "the thing the"
    assert tokenizer.decode(ids) == "the thing the"
    assert bpe.vocab_size(tokenizer) == len(words) + 3 and tokenizer.token_to_id(bpe.EOD) == len(words)


def test_the_embedded_corpus_is_source_text_of_this_installation():
    from training.data.corpus import LEFT_OUT, embedded_files

    files = embedded_files()
    size = sum(os.path.getsize(f.path) for f in files)
    assert 60e6 < size < 200e6
    names = [f.name for f in files]
    assert len(names) == len(set(names)) and names == sorted(names)
    assert (
        "python/asyncio/base_events.py" in names and "torch/nn/functional.py" in names and "wandb/__init__.py" in names
    )
    assert not any(LEFT_OUT & set(name.split("/")[:-1]) for name in names)
    assert {f.group for f in files if f.name.startswith("torch/nn/")} == {"torch/nn"}


# -- no text is lost, no file of others is changed --------------------------------------------------------


def test_cuts_after_empty_lines_change_no_token():
    tokenizer = bpe.train(["a = 1\n\n\nb = 2\n\n"] * 50, 300)
    assert tokenizer.token_to_id("ĊĊ") is not None
    for text in ("a\n\nb", "a\n\n\nb c\n\nd", "。\n。\n\n。"):
        for size in range(1, len(text)):
            ids = [i for part in bpe.chunks(text, size) for i in bpe.encode(tokenizer, part)]
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids, (text, size)


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_truncation_and_padding_of_a_given_tokenizer_are_dropped(tmp_path, small_bpe, setting):
    changed = Tokenizer.from_str(small_bpe.to_str())
    if setting == "truncation":
        changed.enable_truncation(8)
    else:
        changed.enable_padding(length=5000, pad_id=0, pad_token=bpe.EOD)
    changed.save(str(tmp_path / "t.json"))
    text = prose(1, words=500)
    assert bpe.encode(bpe.load(tmp_path / "t.json"), text) == bpe.encode(small_bpe, text)


@pytest.mark.parametrize("part", ["normalizer", "prefix", "bytes"])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, small_bpe, part):
    fields = json.loads(small_bpe.to_str())
    if part == "normalizer":
        fields["normalizer"] = {"type": "Lowercase"}
    elif part == "prefix":
        fields["pre_tokenizer"]["add_prefix_space"] = True
    else:
        fields["model"]["vocab"]["unused"] = fields["model"]["vocab"].pop("ÿ")
    (tmp_path / "t.json").write_text(json.dumps(fields))
    with pytest.raises(PrepareError, match=r"t\.json.*(turns|lacks)"):
        bpe.load(tmp_path / "t.json")


def test_added_tokens_that_are_text_count_their_bytes(small_bpe):
    tokenizer = Tokenizer.from_str(small_bpe.to_str())
    tokenizer.add_tokens([AddedToken("<tool_é>", special=False)])
    text = "a<tool_é>b"
    assert int(bpe.token_bytes(tokenizer)[bpe.encode(tokenizer, text)].sum()) == len(text.encode())


def test_a_bad_row_affects_no_other_row(tmp_path, capsys):
    rows = [prose(i, 8).encode() for i in range(600)]
    rows[300] = b"bad \xff"
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    column = pyarrow.StringArray.from_buffers(600, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(rows)))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    assert prepare_texts(tmp_path / "strict", str(tmp_path / "x.parquet")) == 3
    assert "x.parquet, row 301: not UTF-8" in capsys.readouterr().err
    assert prepare_texts(tmp_path / "out", str(tmp_path / "x.parquet"), "--on_bad", "skip") == 0
    splits = manifest(tmp_path / "out")["splits"]
    assert splits["train"]["documents"] + splits["held_out"]["documents"] == 599
    assert manifest(tmp_path / "out")["skipped"] == {"invalid_utf8": 1}


def test_text_without_a_place_to_cut_is_bad_input(tmp_path, capsys):
    source = folder_of_texts(tmp_path / "in", 6)
    (source / "blob.txt").write_text("good words " * 10 + "x" * (corpus.UNBROKEN_CHARS + 1))
    (source / "long.txt").write_text("good words 。\n" * (corpus.UNBROKEN_CHARS // 8))
    assert prepare_texts(tmp_path / "out", str(source)) == 3
    assert "blob.txt" in capsys.readouterr().err
    assert prepare_texts(tmp_path / "out", str(source), "--on_bad", "skip") == 0
    assert manifest(tmp_path / "out")["skipped"] == {"unbroken": 1}


def test_the_split_does_not_depend_on_how_a_path_is_written(tmp_path, monkeypatch):
    folder_of_texts(tmp_path / "in", 20)
    monkeypatch.chdir(tmp_path)
    for name, path in (("a", "in"), ("b", str(tmp_path / "in")), ("c", "in/*.txt")):
        assert prepare_texts(tmp_path / name, path) == 0
    assert len({manifest(tmp_path / name)["fingerprint"] for name in "abc"}) == 1


def test_files_with_an_unknown_suffix_are_counted(tmp_path, capsys):
    source = folder_of_texts(tmp_path / "in", 6)
    (source / "table.csv").write_text("a,b")
    assert prepare_texts(tmp_path / "out", str(source)) == 0
    assert manifest(tmp_path / "out")["skipped"] == {"unknown_kind": 1}
    assert manifest(tmp_path / "out")["skipped_names"] == {"unknown_kind": [f"{source}/table.csv"]}
    assert f"1 unknown_kind ({source}/table.csv)" in capsys.readouterr().out


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("theirs", ["work/thesis.tex", "train/mine.py", "manifest.json"])
def test_a_folder_that_holds_other_files_is_not_changed(tmp_path, capsys, theirs, force):
    source = folder_of_texts(tmp_path / "in", 6)
    path = tmp_path / "out" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    assert prepare_texts(tmp_path / "out", str(source), *force) == 3
    assert "other files" in capsys.readouterr().err
    assert path.read_text() == "[]" and tree(tmp_path / "out").keys() == {theirs}


def test_a_replacement_that_failed_can_be_repeated(tmp_path, monkeypatch):
    source = str(folder_of_texts(tmp_path / "in", 6))
    assert prepare_texts(tmp_path / "out", source) == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_units", lambda sources: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_texts(tmp_path / "out", source, "--force", vocab=310)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare_texts(tmp_path / "out", source, vocab=310) == 0
    assert manifest(tmp_path / "out")["vocab_size"] == 310


WAITS = """
import sys, time
from training import prepare_data
from training.data import prepare

run_jobs = prepare._run_jobs
if __name__ == "__main__":
    prepare._run_jobs = lambda *args: (run_jobs(*args), time.sleep(1000))
    prepare_data.main(sys.argv[1:])
"""
"""A preparation that never ends: its workers have read their units and wait for more work."""


def test_workers_end_when_their_parent_is_killed(tmp_path, many_units):
    import psutil

    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    process = subprocess.Popen(
        [sys.executable, str(script), "--out", str(tmp_path / "out"), "--workers", "2", str(many_units)],
        cwd=ROOT,
        env=rank_environment(),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "work").glob("scan_*.npz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=60)[1]


# -- nothing is lost in silence ---------------------------------------------------------------------------


def test_a_folder_of_a_stranger_is_prepared_whole_or_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "ANNOUNCE_BYTES", 1)
    source, elsewhere = folder_of_texts(tmp_path / "in", 8), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text(prose(100))
    (source / "link").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    (source / "gone.txt").symlink_to("nowhere")
    (source / "table.csv").write_text("a,b")
    (source / "records.jsonl").write_bytes(lines([{"text": prose(101)}, {"text": prose(102)}]) + b"\n \n")
    with open(os.path.join(os.fsencode(source), b"caf\xe9.txt"), "wb") as file:
        file.write(prose(103).encode())
    (source / "secret").mkdir(mode=0)
    with permissions_apply():
        assert prepare_texts(tmp_path / "out", str(source)) == 3
        message = capsys.readouterr().err
        assert f"{source}/secret: this folder cannot be read (Permission denied)" in message
        assert "--on_bad skip" in message and message.count("\n") == 1
        assert prepare_texts(tmp_path / "out", str(source), "--on_bad", "skip") == 0
    said = capsys.readouterr().out
    assert "the whole takes about" in said and "training the tokenizer" in said
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "held_out")
    assert sorted(found) == sorted(prose(i) for i in (*range(8), 100, 101, 102, 103))
    m = manifest(tmp_path / "out")
    assert m["skipped"] == {"dangling_link": 1, "unknown_kind": 1, "unreadable": 1}
    for kind, name in {"dangling_link": "gone.txt", "unknown_kind": "table.csv", "unreadable": "secret"}.items():
        assert m["skipped_names"][kind] == [f"{source}/{name}"]
        assert f"1 {kind} ({source}/{name})" in said
    assert f"{source}/caf\\xe9.txt" in [entry["name"] for entry in m["sources"]]


def test_documents_that_the_tokenizer_changes_are_refused_left_out_or_kept(tmp_path, capsys, small_bpe):
    nfc = Tokenizer.from_str(small_bpe.to_str())
    nfc.normalizer = normalizers.NFC()
    nfc.save(str(tmp_path / "nfc.json"))
    source = folder_of_texts(tmp_path / "in", 12)
    (source / "accents.txt").write_text("e\u0301tude " * 30)
    argv = (str(source), "--tokenizer", str(tmp_path / "nfc.json"))
    assert prepare_texts(tmp_path / "out", *argv, vocab=None) == 3
    captured = capsys.readouterr()
    assert f"{source}/accents.txt: the tokenizer does not give this text back: 'e\\u0301tude" in captured.err
    assert "normaliser NFC" in captured.out and "--on_bad" not in captured.err
    assert prepare_texts(tmp_path / "out", *argv, "--on_changed", "skip", vocab=None) == 0
    assert f"left out: 1 changed ({source}/accents.txt)" in capsys.readouterr().out
    skipped = manifest(tmp_path / "out")
    assert skipped["skipped"] == {"changed": 1}
    assert f"{source}/accents.txt" not in [entry["name"] for entry in skipped["sources"]]

    assert prepare_texts(tmp_path / "kept", *argv, "--on_changed", "keep", vocab=None) == 0
    assert f"1 of the documents ({source}/accents.txt); 240 bytes became 210" in capsys.readouterr().out
    m = manifest(tmp_path / "kept")
    assert m["changed"] == {"documents": 1, "bytes": 240, "bytes_kept": 210, "names": [f"{source}/accents.txt"]}
    sizes = np.load(tmp_path / "kept" / "token_bytes.npy").astype(np.int64)
    for split in ("train", "held_out"):
        ids = np.concatenate(
            [np.fromfile(tmp_path / "kept" / s["file"], m["dtype"]) for s in m["splits"][split]["shards"]]
        )
        assert sizes[ids].sum() == m["splits"][split]["bytes"]


def test_text_added_later_is_mixed_with_the_first(tmp_path, prepared):
    """The two commands of docs/data.md, "Adding text later"."""
    new = folder_of_texts(tmp_path / "new", 10, words=90)
    first_tokenizer = str(prepared / "tokenizer.json")
    assert prepare_texts(tmp_path / "more", str(new), "--tokenizer", first_tokenizer, vocab=None) == 0
    assert manifest(tmp_path / "more")["tokenizer_sha256"] == manifest(prepared)["tokenizer_sha256"]
    override = f"data.mixture={{{prepared}: 2, {tmp_path / 'more'}: 1}}"
    mixture = load_config(ROOT / "training" / "configs" / "quickstart.yaml", [override]).data.mixture
    assert mixture == {str(prepared): 2.0, str(tmp_path / "more"): 1.0}
    for split in ("train", "held_out"):
        data = PackedTokens(mixture, split=split, max_seq_len=64, seed=0)
        assert (data.vocab_size, data.eod_id) == (300, 0)
        origins = "".join(data.describe(np.arange(1000)))
        assert (origins.count(f"{prepared}/"), origins.count(f"{tmp_path}/more/")) == (667, 333)


@pytest.mark.parametrize("out", ["{tmp}/file", "{tmp}/file/below", "/proc/nowhere", "{tmp}/loop/out"])
def test_an_out_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    assert prepare_texts(Path(out.format(tmp=tmp_path)), str(folder_of_texts(tmp_path / "in", 2))) == 3
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "give another" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "code, where, words",
    [
        (errno.ENOSPC, "out/work/unit_00000.bin", "free some space"),
        (errno.EROFS, "out/work/unit_00000.bin", "give another"),
        (errno.EIO, "out/work/unit_00000.bin", "mend it and run the command again"),
        (errno.EACCES, "in/a.txt", "mend it and run the command again"),
    ],
)
def test_an_error_of_the_disk_is_one_line_with_its_mend(tmp_path, capsys, monkeypatch, code, where, words):
    def fail(options):
        raise OSError(code, os.strerror(code), where)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "_prepare", fail)
    Path("out/work").mkdir(parents=True)
    assert prepare_texts(Path("out"), "x.txt") == 3
    message = capsys.readouterr().err
    assert f"{where}: {os.strerror(code)}; " in message and words in message


@pytest.mark.parametrize("end", [b"\n", b"\n\n \n\r\n", b""])
def test_blank_lines_at_the_end_of_a_file_are_no_records(tmp_path, end):
    path = tmp_path / "a.jsonl"
    how = Reading("text", None, 1 << 20)
    path.write_bytes(lines(GOOD[:1]) + b"\n\n" + lines(GOOD[1:2]) + end)
    items = list(read_documents(Source(str(path), "a.jsonl", None), how))
    assert [str(item) for item in items if isinstance(item, BadRecord)] == [
        "a.jsonl, line 2: empty line",
        "a.jsonl, line 3: empty line",
    ]
    assert [item.text for item in items if isinstance(item, Document)] == [record["text"] for record in GOOD[:2]]


@pytest.mark.parametrize(
    "value, words",
    [
        (b"bytes", "bytes (a binary column)"),
        (5, "a number"),
        (1.5, "a number"),
        (True, "true or false"),
        (["a", "b"], "a list"),
        ({"a": "b"}, "an object"),
    ],
)
def test_a_column_without_text_is_named_as_what_it_holds(tmp_path, value, words):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [value]}), path)
    (item,) = read_documents(Source(str(path), "a.parquet", None), Reading("text", None, 1 << 20))
    assert item.kind == "not_text"
    assert str(item).startswith(f"a.parquet, row 1: field 'text' holds {words}, not text; convert it")


def test_a_list_as_a_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (item,) = read_documents(Source(str(tmp_path / "a.jsonl"), "a.jsonl", None), Reading("text", None, 1 << 20))
    assert (
        str(item)
        == "a.jsonl, line 1: this line holds a list, not an object with named fields; write one object per line"
    )


def test_a_group_may_hold_half_a_surrogate_pair(tmp_path):
    unit = prepare.Unit(0, (Source(str(tmp_path / "a.jsonl"), "a.jsonl", None),))
    (tmp_path / "a.jsonl").write_text('{"text": "one", "of": "\\ud800"}\n')
    scan = prepare._scan(prepare.Job(unit, str(tmp_path), "k", Reading("text", "of", 1 << 20), False))
    assert len(scan["groups"]) == 1


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    progress = pace.Progress("encoding", 8_000_000, multiprocessing.Value("q", 5))
    assert progress._done.value == 0
    for seconds, done in ((1, 1_000_000), (30, 2_000_000), (31, 3_000_000), (60, 4_000_000)):
        clock[0], progress._done.value = 100.0 + seconds, done
        progress.show()
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "encoding: 2 of 8 MB, 0.1 MB/s, about 2 min left",
        "encoding: 4 of 8 MB, 0.1 MB/s, about 60 s left",
    ]


def test_a_preparation_goes_on_when_nobody_reads_its_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    argv = ["--out", str(tmp_path / "out"), "--vocab_size", "300", str(folder_of_texts(tmp_path / "in", 6))]
    command = [sys.executable, "-m", "training.prepare_data", *argv]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and manifest(tmp_path / "out")


def test_an_estimate_names_its_parts(small_bpe):
    line = pace.estimate(
        [prose(1)],
        small_bpe,
        text_bytes=1e6,
        largest_unit_bytes=1e6,
        tokenizer_text_bytes=1e6,
        reading_s=100.0,
        workers=4,
    )
    assert re.fullmatch(
        r"the whole takes about 3 min: reading 2 min, encoding (2 min|1\d\d s); measured on its first 0.0 MB, for 1 MB "
        r"of text and 4 workers",
        line,
    ), line
