"""The bytes that are trained on are the bytes that were prepared, and a stranger's dataset can do nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from support.tiny_dataset import write_dataset

from gsa.files import read_small_file
from training.config import BatchPlan
from training.data import dataset, proof
from training.data.dataset import DataError, PackedTokens
from training.data.loader import Loader
from training.data.manifest import read_manifest, shards_of
from training.data.proof import BackgroundProof, prove_dataset

SHARD = "train/shard_00000.bin"
ENDS = "train/shard_00000.ends.npy"


@pytest.fixture
def data(tmp_path) -> Path:
    """A dataset of three training shards."""
    random = np.random.Generator(np.random.PCG64(0))
    texts = [random.integers(0, 63, random.integers(5, 60)).tolist() for _ in range(40)]
    write_dataset(tmp_path / "d", texts, vocab_size=64, held_out=texts[:4], shard_tokens=500)
    return tmp_path / "d"


def opened(folder: Path, split: str = "train") -> PackedTokens:
    return PackedTokens({str(folder): 1.0}, split=split, max_seq_len=16, seed=0)


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = change(manifest) or manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    info = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # as a copy with rsync -t leaves it


# -- changed bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, ENDS, "held_out/shard_00000.bin", "tokenizer.json", "token_counts.npy"])
def test_a_changed_byte_is_refused_by_name_at_the_next_start(data, name):
    edit_manifest(data, lambda m: m | {"token_counts_sha256": sha256(data / "token_counts.npy")})
    for split in ("train", "held_out"):
        opened(data, split)
    flip(data / name)
    with pytest.raises(DataError, match=rf"{Path(name).name}: its sha256 is not that of the manifest; restore"):
        [opened(data, split) for split in ("train", "held_out")]


def test_token_bytes_are_compared_with_their_hash_or_named_as_unverifiable(data):
    assert any("token_bytes.npy: the manifest has no sha256" in line for line in opened(data).notes())
    edit_manifest(
        data, lambda m: m | {f"token_{x}_sha256": sha256(data / f"token_{x}.npy") for x in ("bytes", "counts")}
    )
    assert not opened(data).notes()
    np.save(data / "token_bytes.npy", np.load(data / "token_bytes.npy") * np.uint16(10))
    with pytest.raises(DataError, match=r"token_bytes.npy: its sha256 is not that of the manifest"):
        opened(data)


def test_an_id_outside_the_vocabulary_is_found_though_every_hash_agrees(data):
    tokens = np.fromfile(data / SHARD, "<u2")
    tokens[7] = 60000
    tokens.tofile(data / SHARD)
    edit_manifest(data, lambda m: m["splits"]["train"]["shards"][0].update(sha256=sha256(data / SHARD)))
    with pytest.raises(DataError, match=r"shard_00000.bin holds the id 60000, outside the vocabulary of 64"):
        opened(data)


def test_a_good_shard_is_remembered_and_a_changed_one_read_again(data, monkeypatch):
    read = []
    real = proof.prove_shard
    monkeypatch.setattr(proof, "prove_shard", lambda shard, *rest: read.append(shard.path.name) or real(shard, *rest))
    opened(data)
    assert len(read) == 3
    opened(data)
    assert len(read) == 3
    os.utime(data / SHARD)
    opened(data)
    assert read[3:] == ["shard_00000.bin"]
    for path in (data / "packed").glob("verified_*.json"):
        path.write_text("[[]]{")  # a damaged memory is none
    opened(data)
    assert len(read) == 7


def test_nothing_is_remembered_in_a_folder_that_cannot_be_written(data, monkeypatch):
    monkeypatch.setattr(proof, "write_atomically", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only")))
    opened(data)
    assert not list((data / "packed").glob("verified_*"))


# -- large splits: in the background ----------------------------------------------------------------------


@pytest.fixture
def large(data, monkeypatch) -> Path:
    """The dataset, as if it was too large to be read when it is opened."""
    monkeypatch.setattr(dataset, "AT_ONCE_BYTES", 0)
    return data


def finished(check: BackgroundProof) -> BackgroundProof:
    check._thread.join(60)
    assert not check._thread.is_alive()
    return check


def test_the_ranks_of_a_node_share_the_work_and_remember_it(large):
    shards = opened(large).unproved
    assert len(shards) == 3
    faults: list[str] = []
    for part in (0, 1):
        with BackgroundProof(shards, failed=faults.append, part=part, parts=2) as check:
            assert finished(check).left == 0
        assert len(opened(large).unproved) == (1, 0)[part]
    assert not faults


def test_a_changed_shard_is_reported_once_by_name(large):
    flip(large / SHARD)
    text = opened(large)
    with BackgroundProof(text.unproved, failed=text.report_fault) as check:
        finished(check)
    assert text.fault.startswith(f"{large / SHARD}: its sha256 is not that of the manifest")
    assert len(opened(large).unproved) == 3


def test_an_id_outside_the_vocabulary_reaches_no_model(large):
    tokens = np.fromfile(large / SHARD, "<u2")
    tokens[:] = 60000
    tokens.tofile(large / SHARD)
    edit_manifest(large, lambda m: m["splits"]["train"]["shards"][0].update(sha256=sha256(large / SHARD)))
    text = opened(large)
    with pytest.raises(DataError, match=r"shard_00000.bin holds the id 60000, outside the vocabulary of 64"):
        text.batch(np.arange(text.n_windows))
    with BackgroundProof(text.unproved, failed=text.report_fault) as check:
        finished(check)
    assert "holds the id 60000" in text.fault


def test_what_a_short_launch_could_not_read_is_announced(large, monkeypatch, capsys):
    waiting = threading.Event()
    monkeypatch.setattr(proof, "prove_shard", lambda shard, go_on: waiting.wait(60) and go_on())
    with BackgroundProof(opened(large).unproved, failed=pytest.fail):
        waiting.set()
    out = capsys.readouterr().out
    assert "note: 3 shards were not read to their end" in out and "training.verify" in out


# -- a file that changes while it is read -----------------------------------------------------------------


def one_step(text: PackedTokens, **kwargs) -> Loader:
    plan = BatchPlan(4, 1, 1, 4)
    return Loader(text, samples_consumed=0, plan=plan, rank=0, num_workers=1, pin_memory=False, **kwargs)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(data):
    text = opened(data)
    text.batch(np.arange(text.n_windows))
    for path in (data / "train").glob("*.bin"):
        os.truncate(path, 0)
    loader = one_step(text)
    with pytest.raises(DataError, match=r"samples 0\.\.3 cannot be read: \S+shard_0000\d\.bin was cut off"):
        next(loader)
    loader.close()
    loader = one_step(text, defer_faults=True)
    batch = next(loader)
    assert batch.tokens.shape == (4, 16) and int(batch.targets.max()) == -100
    assert "was cut off while it was being read" in text.fault
    loader.close()


def test_a_dataset_that_is_replaced_while_it_is_read_goes_on_from_its_open_files(data):
    text = opened(data)
    before = text.batch(np.arange(text.n_windows)).tokens
    for path in (data / "train").glob("*.bin"):
        other = path.with_suffix(".new")
        other.write_bytes(bytes(path.stat().st_size))
        os.replace(other, path)
    assert (text.batch(np.arange(text.n_windows)).tokens == before).all()


def test_a_shard_that_was_replaced_before_it_was_opened_is_named(data):
    text = opened(data)
    os.rename(data / SHARD, data / "old")
    (data / SHARD).write_bytes((data / "old").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000\.bin was replaced while it was being read"):
        text.batch(np.arange(text.n_windows))


# -- a stranger's folder ----------------------------------------------------------------------------------


def first_shard(**values):
    return lambda folder, m: m["splits"]["train"]["shards"][0].update(values)


def outside(folder: Path, m: dict) -> None:
    victim = folder.parent / "victim" / "train"
    victim.mkdir(parents=True)
    for name in (SHARD, ENDS):
        (victim / Path(name).name).write_bytes((folder / name).read_bytes())
    m["splits"]["train"]["shards"][0]["file"] = "../victim/train/shard_00000.bin"


MANIFESTS = {
    "no splits": (lambda folder, m: m.update(splits={}), "splits has no train and no held_out"),
    "splits of another type": (lambda folder, m: m.update(splits=[1]), "splits has no train"),
    "a split of another type": (lambda folder, m: m["splits"].update(train=3), "train split has no list of shards"),
    "an empty shard": (lambda folder, m: m["splits"]["train"].update(shards=[{}]), "is the file None"),
    "a shard of another type": (lambda folder, m: m["splits"]["train"].update(shards=[7]), "is not described"),
    "objects": (lambda folder, m: m.update(dtype="O"), "dtype is 'O', not uint16 or uint32"),
    "floats": (lambda folder, m: m.update(dtype="float64"), "dtype is 'float64'"),
    "a list as type": (lambda folder, m: m.update(dtype=["<u2"]), "dtype is"),
    "text as vocabulary": (lambda folder, m: m.update(vocab_size="64"), "vocab_size is '64'"),
    "true as vocabulary": (lambda folder, m: m.update(vocab_size=True), "vocab_size is True"),
    "a negative vocabulary": (lambda folder, m: m.update(vocab_size=-1), "vocab_size is -1"),
    "a vocabulary above its type": (
        lambda folder, m: m.update(vocab_size=10**6),
        "vocab_size is 1000000, not a number",
    ),
    "a smaller vocabulary": (lambda folder, m: m.update(vocab_size=10, eod_id=3), "token_bytes.npy"),
    "a large end token": (lambda folder, m: m.update(eod_id=10**9), "eod_id is 1000000000, not an id"),
    "a negative end token": (lambda folder, m: m.update(eod_id=-7), "eod_id is -7"),
    "a fingerprint of another type": (lambda folder, m: m.update(fingerprint=[1]), "fingerprint is .1., not a text"),
    "a false fingerprint": (lambda folder, m: m.update(key="x"), "fingerprint is not that of its tokenizer and shards"),
    "a path outside": (outside, "is the file '../victim/train/shard_00000.bin', which is not a shard in its folder"),
    "an absolute path": (first_shard(file="/etc/passwd"), "is the file '/etc/passwd'"),
    "a path with an escape": (first_shard(file="train/\x1b[2J.bin"), r"is the file 'train/\\x1b"),
    "a shard of the other split": (first_shard(file="held_out/shard_00000.bin"), "not a shard in its folder train"),
    "a shard twice": (first_shard(file="train/shard_00001.bin"), "names a shard twice"),
    "negative tokens": (first_shard(tokens=-5), "has -5 tokens"),
    "fewer tokens than documents": (first_shard(tokens=1), "has 1 tokens in"),
    "a billion documents": (first_shard(documents=10**12), "which cannot be"),
    "other tokens": (first_shard(tokens=400), "has .* tokens, its shards"),
    "other documents": (lambda folder, m: m["splits"]["train"].update(documents=3), "has 3 documents, its shards"),
    "no hash": (first_shard(sha256=None), "has no sha256"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused(data, name):
    change, says = MANIFESTS[name]
    edit_manifest(data, lambda m: change(data, m))
    with pytest.raises(DataError, match=says) as refused:
        opened(data)
    text = str(refused.value)
    assert "\n" not in text and text.isprintable() and len(text) < 600 + 3 * len(str(data))
    assert not list(data.parent.glob("victim/**/packed"))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_a_manifest_that_is_no_json_is_refused(data, content, says):
    (data / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=says):
        opened(data)


@pytest.mark.parametrize(
    "name", ["manifest.json", "token_bytes.npy", "token_counts.npy", "tokenizer.json", SHARD, ENDS]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_what_is_no_file_is_refused_without_waiting(data, name, kind):
    path = data / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif name == "tokenizer.json":
        assert opened(data).tokenizer is None
        return
    with pytest.raises(DataError, match=Path(name).name):
        opened(data)


def header_only(ends: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.lib.format.write_array_header_1_0(body, {"descr": "<i8", "fortran_order": False, "shape": (2**45,)})
    return body.getvalue() + bytes(64)


@pytest.mark.parametrize(
    "forge",
    [
        lambda ends: np.array([{"x": 1}] * len(ends), dtype=object),
        lambda ends: ends.astype(np.float64),
        lambda ends: ends.astype(">i8"),
        lambda ends: np.concatenate([ends[:-1][::-1], ends[-1:]]),
        lambda ends: np.concatenate([-ends[:-1] * 10**12, ends[-1:]]),
        lambda ends: np.concatenate([ends[:1] * 0, ends[1:]]),
        lambda ends: np.stack([ends, ends], 1),
        lambda ends: ends[:-1],
        header_only,
        lambda ends: b"",
        lambda ends: b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
    ],
)
def test_forged_document_ends_are_refused(data, forge):
    forged = forge(np.load(data / ENDS))
    if isinstance(forged, bytes):
        (data / ENDS).write_bytes(forged)
    else:
        np.save(data / ENDS, forged, allow_pickle=True)
    edit_manifest(data, lambda m: m["splits"]["train"]["shards"][0].update(ends_sha256=sha256(data / ENDS)))
    with pytest.raises(DataError, match=r"shard_00000\.ends\.npy"):
        opened(data)


@pytest.mark.parametrize(
    "table, forged",
    [
        ("token_bytes.npy", np.zeros(3, np.uint16)),
        ("token_bytes.npy", np.zeros(64, np.uint16)),
        ("token_bytes.npy", np.array([{}] * 64, dtype=object)),
        ("token_counts.npy", np.zeros(64, np.int64)),
        ("token_counts.npy", np.full(64, -1)),
        ("token_counts.npy", np.full(64, 2**62)),
    ],
)
def test_forged_tables_are_refused(data, table, forged):
    np.save(data / table, forged, allow_pickle=True)
    with pytest.raises(DataError, match=table):
        opened(data)


FORGED_TOKENIZERS = [
    (lambda t: t["model"]["vocab"].update(w1=4294967295), "has 4294967296 entries, the dataset 64"),
    (lambda t: (t["model"].update(type="BPE", vocab={}, merges=[]), t.update(decoder=BYTES)), "has 0 entries"),
    (lambda t: t.update(decoder=BYTES), "token_bytes.npy is not of"),
]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("forge, says", FORGED_TOKENIZERS)
def test_a_forged_tokenizer_is_refused_and_allocates_nothing(data, forge, says):
    path = data / "tokenizer.json"
    forged = json.loads(path.read_text())
    forge(forged)
    path.write_text(json.dumps(forged))
    edit_manifest(data, lambda m: m | {"tokenizer_sha256": sha256(path)})
    with pytest.raises(DataError, match=says):
        opened(data).require_true_token_bytes()


def test_a_tokenizer_that_cannot_be_loaded_shows_no_text(data):
    (data / "tokenizer.json").write_text("{}")
    edit_manifest(data, lambda m: m | {"tokenizer_sha256": sha256(data / "tokenizer.json")})
    opened(data).require_true_token_bytes()  # there is nothing to compare
    with pytest.raises(DataError, match="tokenizer.json cannot be loaded"):
        opened(data).load_tokenizer()


def compressed(arrays: dict) -> bytes:
    body = io.BytesIO()
    np.savez_compressed(body, **(arrays | {"start": np.zeros(2**22, np.int64)}))
    return body.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"start": a["start"] * 0},
        lambda a: a | {"start": a["start"] + 10**9},
        lambda a: a | {"start": a["start"] - 1},
        lambda a: a | {"length": a["length"] - 1},
        lambda a: a | {"first": a["first"][:2]},
        lambda a: a | {"first": a["first"][::-1]},
        lambda a: a | {"targets": a["targets"] + 1},
        lambda a: a | {"whole": ~a["whole"]},
        lambda a: {name: array for name, array in a.items() if name != "whole"},
        lambda a: a | {"start": np.array([{}], dtype=object)},
        compressed,
    ],
)
def test_a_forged_window_table_is_made_again(data, change, capsys):
    before = opened(data).batch(np.arange(20)).tokens
    path = next((data / "packed").glob("train_shard_00000_*.npz"))
    changed = change(dict(np.load(io.BytesIO(path.read_bytes()[32:]))))
    if not isinstance(changed, bytes):
        body = io.BytesIO()
        np.savez(body, **changed)
        changed = body.getvalue()
    path.write_bytes(hashlib.sha256(changed).digest() + changed)
    assert (opened(data).batch(np.arange(20)).tokens == before).all()
    assert "is damaged; making it again" in capsys.readouterr().err


def test_nothing_is_written_through_a_link(data, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (data / "packed").symlink_to(tmp_path / "elsewhere")
    opened(data)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "it is a link" in capsys.readouterr().err


# -- the proof of a whole dataset -------------------------------------------------------------------------


def test_a_whole_dataset_is_proved(data):
    lines: list[str] = []
    prove_dataset(data, report=lines.append)
    assert any("train: 3 shards" in line for line in lines)
    shard = shards_of(data, read_manifest(data), "train")[1]
    flip(shard.path)
    with pytest.raises(DataError, match=r"shard_00001\.bin: its sha256"):
        prove_dataset(data)


def test_a_whole_dataset_is_proved_though_every_hash_agrees(data):
    counts = np.load(data / "token_counts.npy")
    counts[[1, 2]] += [1, -1]
    np.save(data / "token_counts.npy", counts)
    with pytest.raises(DataError, match="does not count the training text"):
        prove_dataset(data)


def test_a_small_file_is_read_to_its_limit_and_not_beyond(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    assert read_small_file(tmp_path / "f", 5) == b"12345"
    with pytest.raises(OSError, match="longer than the 4 bytes"):
        read_small_file(tmp_path / "f", 4)
