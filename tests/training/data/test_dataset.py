"""The order of the data is a contract; each pass has every token once; targets stay in their document."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_dataset import write_dataset

from training.config import BatchPlan
from training.data import dataset
from training.data.dataset import DataError, PackedTokens
from training.data.loader import Loader, step_samples
from training.data.order import BLOCK, Order, permute
from training.data.packing import pack


def documents(lengths: list[int]) -> list[list[int]]:
    """Documents of the given lengths. No token occurs twice, so that a token identifies its position."""
    ends = np.cumsum(lengths)
    return [list(range(end - n, end)) for n, end in zip(lengths, ends.tolist(), strict=True)]


def opened(folder: Path, T: int = 8, **kwargs) -> PackedTokens:
    return PackedTokens({str(folder): 1.0}, split="train", max_seq_len=T, seed=kwargs.pop("seed", 0), **kwargs)


@pytest.fixture
def small(tmp_path) -> Path:
    write_dataset(
        tmp_path / "d",
        documents([5, 3, 20, 1, 7, 8, 9, 16, 2, 30] * 3),
        vocab_size=5000,
        held_out=documents([9]),
        shard_tokens=90,
    )
    return tmp_path / "d"


# -- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 10, 97, 1000, 4096, 65537])
def test_a_permutation_visits_everything_once(n):
    for key in (0, "a", (1, 2)):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_golden_order():
    """If this fails, runs no longer resume where they stopped. Do not update the numbers; fix the code."""
    assert permute(np.arange(6), 10**9, (1234, "source", 0, 0)).tolist() == GOLDEN_BILLION
    order = Order([700, 90], [3.0, 1.0], seed=5)
    place = order(np.arange(12))
    assert place.source.tolist() == GOLDEN_SOURCE and place.window.tolist() == GOLDEN_WINDOW


GOLDEN_BILLION = [68428103, 596107320, 608096668, 872910965, 716855112, 71783269]
GOLDEN_SOURCE = [0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
GOLDEN_WINDOW = [417, 28, 71, 586, 48, 697, 270, 507, 605, 416, 677, 32]


def test_the_order_looks_random():
    n = 100_003
    p = permute(np.arange(n), n, 5).astype(float)
    assert abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 0.015
    d = np.diff(p)
    assert abs(np.corrcoef(d[:-1], d[1:])[0, 1] + 0.5) < 0.015  # the value for independent draws
    counts = np.zeros((20, 20))
    for key in range(4000):
        counts[np.arange(20), permute(np.arange(20), 20, key)] += 1
    chi = ((counts - 200) ** 2 / 200).sum(1)
    assert 8 < chi.mean() < 33  # 19 degrees of freedom


def test_a_billion_windows_cost_no_table():
    place = Order([10**9], [1.0], seed=0)(np.arange(5 * 10**9, 5 * 10**9 + 64))
    assert place.epoch.tolist() == [5] * 64 and len(set(place.window.tolist())) == 64


def test_outside_the_range_is_an_error():
    with pytest.raises(IndexError):
        permute(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="0 < n"):
        permute(np.array([0]), 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_epochs_visit_every_window_exactly_twice(small, seed):
    data = opened(small, seed=seed)
    place = data._order(np.arange(2 * data.n_windows))
    assert np.bincount(place.window).tolist() == [2] * data.n_windows
    first, second = place.window[: data.n_windows], place.window[data.n_windows :]
    assert not np.array_equal(first, second)
    assert data.epoch(2 * data.n_windows) == 2.0


def test_mixture_shares_are_exact_in_every_block_and_each_source_has_its_own_epochs():
    order = Order([300, 70], [0.8, 0.2], seed=3)
    assert order.parts == [4, 1]
    order = Order([300, 70, 50], [0.701, 0.2, 0.099], seed=3)
    assert order.parts == [701, 200, 99] and sum(order.parts) == BLOCK
    place = order(np.arange(3 * BLOCK))
    for block in range(3):
        assert np.bincount(place.source[block * BLOCK : (block + 1) * BLOCK]).tolist() == [701, 200, 99]
    for source, windows in enumerate([300, 70, 50]):
        mine = place.window[place.source == source]
        for e in range(len(mine) // windows):
            assert len(np.unique(mine[place.epoch[place.source == source] == e])) == windows
    assert order.epochs(3 * BLOCK) == pytest.approx([2103 / 300, 600 / 70, 297 / 50])


def test_the_first_pass_is_what_a_walk_along_the_order_finds():
    order = Order([30, 50, 7], [0.3, 0.5, 0.04], seed=3)
    samples = np.arange(20 * BLOCK)
    place = order(samples)
    walked = samples[place.epoch == 0]
    assert len(walked) == 87
    for count in (1, 29, 60, 87, 1000):
        assert np.array_equal(order.first_pass(count, [0, 1, 2]), walked[:count])
    without_the_second = samples[(place.epoch == 0) & (place.source != 1)]
    assert np.array_equal(order.first_pass(1000, [0, 2]), without_the_second)


def held_out_mixture(folder: Path, windows: dict[str, int], weights: dict[str, float]) -> PackedTokens:
    """Held-out splits in which each document fills one window of 16 tokens, and all tokens differ."""
    for i, (name, count) in enumerate(windows.items()):
        texts = [list(range(15 * n + 3000 * i, 15 * n + 15 + 3000 * i)) for n in range(count)]
        write_dataset(folder / name, texts[:1], vocab_size=9000, held_out=texts)
    sources = {str(folder / name): weight for name, weight in weights.items()}
    return PackedTokens(sources, split="held_out", max_seq_len=16, seed=0)


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.002, 0.998), (1.0, 1.0)])
def test_each_held_out_window_of_a_mixture_is_scored_once(tmp_path, weights):
    data = held_out_mixture(tmp_path, {"a": 40, "b": 40}, dict(zip("ab", weights, strict=True)))
    every = data.distinct(0)
    assert len(every) == 80 and (np.diff(every) > 0).all()
    rows = {tuple(row) for row in data.batch(every).tokens.tolist()}
    assert len(rows) == 80
    for count in (1, 17, 79, 500):  # the first ones of the same order
        assert np.array_equal(data.distinct(count), every[:count])


def test_one_dataset_under_two_names_is_scored_once(tmp_path):
    held_out_mixture(tmp_path, {"a": 5}, {"a": 1.0})
    sources = {str(tmp_path / "a"): 0.5, f"{tmp_path}/./a": 0.5}
    data = PackedTokens(sources, split="held_out", max_seq_len=16, seed=0)
    windows = data.batch(data.distinct(0)).tokens.tolist()
    assert len(windows) == 5 and len({tuple(row) for row in windows}) == 5


def test_without_a_mixture_the_held_out_windows_are_scored_in_the_order_they_always_were(small):
    data = PackedTokens({str(small): 1.0}, split="train", max_seq_len=8, seed=0)
    assert data.distinct(7).tolist() == list(range(7)) and data.distinct(0).tolist() == list(range(data.n_windows))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_windows_of_a_step_do_not_depend_on_ranks_or_workers(small, workers):
    data = opened(small)
    reference = None
    for world, micro in ((1, 12), (1, 2), (2, 3), (3, 2), (4, 3)):
        plan = BatchPlan(micro, 12 // (micro * world), world, 12)
        steps = [[], []]
        for rank in range(world):
            loader = Loader(data, samples_consumed=24, plan=plan, rank=rank, num_workers=workers, pin_memory=False)
            for step in steps:
                step += [next(loader).tokens for _ in range(plan.accumulation_steps)]
            loader.close()
        rows = [sorted(row for batch in step for row in batch.tolist()) for step in steps]
        reference = reference or rows
        assert rows == reference
    assert reference[0] != reference[1]


def test_micro_batches_of_a_step_partition_it():
    plan = BatchPlan(2, 3, 4, 24)
    numbers = np.concatenate([s for rank in range(4) for s in step_samples(48, plan, rank)])
    assert sorted(numbers.tolist()) == list(range(48, 72))


def test_an_error_of_a_reader_is_raised_with_its_sample_numbers(small, monkeypatch):
    data = opened(small)
    monkeypatch.setattr(PackedTokens, "batch", lambda self, samples: 1 / 0)
    for workers in (0, 2):
        loader = Loader(
            data, samples_consumed=8, plan=BatchPlan(4, 1, 1, 4), rank=0, num_workers=workers, pin_memory=False
        )
        with pytest.raises(DataError, match=r"samples 8\.\.11 cannot be read: ZeroDivisionError"):
            next(loader)
        loader.close()


# -- windows ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 6, 7, 8, 9, 15, 16, 17, 40]), min_size=1, max_size=30),
    T=st.sampled_from([4, 8, 11]),
)
def test_every_token_occurs_once_and_targets_stay_in_the_document(tmp_path_factory, lengths, T):
    folder = tmp_path_factory.mktemp("d")
    write_dataset(folder, documents(lengths), vocab_size=2000, held_out=[[1]], shard_tokens=60)
    data = opened(folder, T)
    batch = data.batch(np.arange(data.n_windows))
    tokens, targets, start = (x.numpy() for x in (batch.tokens, batch.targets, batch.doc_start))
    eod, ends = 1999, set(np.cumsum(lengths) - 1)
    real = tokens[tokens != eod]
    assert sorted(real.tolist()) == list(range(sum(lengths)))
    position = np.tile(np.arange(T), (len(tokens), 1))
    assert ((0 <= start) & (start <= position)).all()
    for row in range(len(tokens)):
        for t in range(T):
            token, target = tokens[row, t], targets[row, t]
            if token == eod:
                assert target == -100
            else:
                assert target == (eod if token in ends else token + 1)
            if t > 0 and start[row, t] < t:  # same document as the position before
                assert token == eod or token == tokens[row, t - 1] + 1
                assert start[row, t] == start[row, t - 1]
    assert (targets >= 0).sum() == sum(lengths) == data.n_targets(0, data.n_windows)
    assert int(data.n_targets(1, 2)) == int((data.batch(np.arange(1, 3)).targets >= 0).sum())


def test_best_fit_cuts_only_documents_longer_than_a_window_and_pads_little():
    random = np.random.default_rng(0)
    lengths = np.maximum(random.lognormal(6.3, 1.1, 3000).astype(np.int64), 5)
    windows = pack(np.cumsum(lengths), 2048)
    assert 1 - lengths.sum() / (len(windows) * 2048) < 0.01
    spans_of_short = np.isin(windows.length, lengths[lengths <= 2048])
    assert (windows.length == 2048).sum() >= (lengths // 2048).sum() and spans_of_short.sum() > 2000


def test_the_window_table_is_cached_and_a_damaged_cache_is_made_again(small, capsys):
    before = opened(small).batch(np.arange(4)).tokens
    files = sorted((small / "packed").iterdir())
    assert files and not [f for f in files if f.suffix == ".tmp"]
    raw = bytearray(files[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    files[0].write_bytes(raw)
    assert (opened(small).batch(np.arange(4)).tokens == before).all()
    assert f"{files[0]} is damaged; making it again" in capsys.readouterr().err
    opened(small)
    assert "damaged" not in capsys.readouterr().err


def test_a_dataset_that_cannot_be_written_can_be_read(small, capsys, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert opened(small).n_windows > 0
    assert "stays in memory: Permission denied" in capsys.readouterr().err


# -- refusals ---------------------------------------------------------------------------------------------


def test_an_error_in_a_dataset_names_the_file(small, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a prepared dataset.*prepare_data --out .*nowhere"):
        opened(tmp_path / "nowhere")
    shard = small / "train" / "shard_00000.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-2])
    with pytest.raises(DataError, match=rf"shard_00000.bin has {len(raw) - 2} bytes, its manifest says {len(raw)}"):
        opened(small)
    shard.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(DataError, match="shard_00000.bin: its sha256 is not that of the manifest"):
        opened(small).verify()
    os.unlink(shard)
    with pytest.raises(DataError, match="shard_00000.bin: No such file"):
        opened(small)
    manifest = json.loads((small / "manifest.json").read_text())
    (small / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(DataError, match="has format 9, this project reads 1"):
        opened(small)


def test_a_changed_document_end_is_refused(small):
    path = small / "train" / "shard_00000.ends.npy"
    ends = np.load(path)
    ends[0] -= 1
    np.save(path, ends)
    with pytest.raises(DataError, match="shard_00000.ends.npy: its sha256 is not that of the manifest"):
        opened(small)


def test_different_tokenizers_and_impossible_weights_are_refused(small, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, documents([5]), vocab_size=5000, held_out=[[1]])
    (other / "tokenizer.json").write_text("{1}")
    sha256 = hashlib.sha256(b"{1}").hexdigest()
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": sha256}))
    with pytest.raises(DataError, match="different tokenizers"):
        PackedTokens({str(small): 1.0, str(other): 1.0}, split="train", max_seq_len=8, seed=0)
    write_dataset(other, documents([5]), vocab_size=5000, held_out=[[1]])
    for weight in (0.0, -1.0, 1e-5, float("inf"), float("nan")):
        with pytest.raises(
            DataError, match=rf"weight {weight} of \S+other (must be above 0 and finite|is below 1/1000 of)"
        ):
            PackedTokens({str(small): 1.0, str(other): weight}, split="train", max_seq_len=8, seed=0)


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "OPEN_SHARDS", 5)
    write_dataset(tmp_path, documents([20] * 60), vocab_size=5000, held_out=[[1]], shard_tokens=40)
    before = len(os.listdir("/proc/self/fd"))
    data = opened(tmp_path)
    assert len(list((tmp_path / "train").glob("*.bin"))) == 60
    assert data.batch(np.arange(50)).tokens.shape == (50, 8)
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del data
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("content", ["[]", '{"format": 1}', '{"format": 1, "dtype": "uint16"}'])
def test_a_manifest_that_lacks_something_is_refused(small, content):
    (small / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest.json (has format None|lacks )"):
        opened(small)


def test_the_fingerprint_depends_on_text_and_mixture(small, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, documents([5, 6]), vocab_size=5000, held_out=[[1]])

    def fingerprint(*weights):
        sources = dict(zip((str(small), str(other)), weights, strict=False))
        return PackedTokens(sources, split="train", max_seq_len=8, seed=0).fingerprint

    assert fingerprint(1.0) == fingerprint(2.0)
    assert len({fingerprint(1.0), fingerprint(1.0, 1.0), fingerprint(1.0, 3.0)}) == 3


def test_token_ids_above_65535_are_read_unchanged(tmp_path):
    write_dataset(tmp_path / "w", [[70000, 4464, 150000]], vocab_size=151936, held_out=[[1]])
    assert opened(tmp_path / "w").batch(np.arange(1)).tokens[0, :3].tolist() == [70000, 4464, 150000]
