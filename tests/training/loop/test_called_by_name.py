"""What a resume, a score and a tracked run are called is what they are: one launch per number of ranks, real engines."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import documents
from support.launching import Case, run_cases
from support.tiny_dataset import write_dataset

from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from training.checkpointing.resume import position_in_text
from training.data.dataset import PackedTokens
from training.loop.progress import Progress
from training.loop.rerun import checkpoint_before, rerun_step, trainings_of
from training.record.metrics_log import read_rows
from training.record.numerics import differences, of_run
from training.record.replay_receipt import ReplayReceipt, describe
from training.reporting.tables import receipt_words


def events_of(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> dict[str, float]:
    """Two datasets with as much held-out text, of which a mixture takes much less of the second."""
    base = tmp_path_factory.mktemp("mixed")
    for name, seed in (("a", 11), ("b", 12)):
        write_dataset(base / name, documents(60, seed), vocab_size=64, held_out=documents(40, seed + 10))
    return {str(base / "a"): 0.9, str(base / "b"): 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_yaml, mixed) -> Path:
    """Folders <ranks>/<name>/ of the runs that the tests read."""
    base = tmp_path_factory.mktemp("named")
    mixture = "data.mixture={" + ", ".join(f"{folder}: {weight}" for folder, weight in mixed.items()) + "}"
    for ranks in (1, 2):
        folder = base / str(ranks)

        def case(name, *extra, code=0, into=None, folder=folder):
            return Case(name, ("--config", str(tiny_yaml), "--output_dir", str(folder / (into or name)), *extra), code)

        cases = [case("mixture", mixture, "training.eval_windows=0", "training.max_steps=1")]
        if ranks == 1:
            other = next(iter(mixed))
            cases += [
                case("texts_a", "training.stop_at_step=2", into="texts"),
                case(
                    "texts_b",
                    "--resume_from",
                    "latest",
                    "--allow_config_change",
                    f"data.data_dir={other}",
                    "training.stop_at_step=4",
                    into="texts",
                ),
                case("texts_c", "--resume_from", "latest", "--allow_config_change", into="texts"),
            ]
        short = ("training.eval_interval=0", "training.save_interval=2", "training.max_steps=4")
        if ranks == 1:
            cases += [
                case("replayed", *short),
                case("as_before", *short, "--resume_from", "step_2", into="replayed"),
                case("reference", *short, "training.backend=reference", "--resume_from", "step_2", into="replayed"),
            ]
        else:
            again = (*short, "training.backend=reference", "--resume_from", "step_2")
            cases += [case("on_two", *again, into="../1/replayed"), case("on_two_again", *again, into="../1/replayed")]
        (folder / "output.txt").parent.mkdir()
        (folder / "output.txt").write_text(run_cases(ranks, cases, folder))
    return base


# -- held-out scores ---------------------------------------------------------------------------------------


def test_eval_windows_0_scores_each_held_out_window_of_a_mixture_once_on_any_ranks(runs, mixed):
    held_out = [PackedTokens({folder: 1.0}, split="held_out", max_seq_len=32, seed=0) for folder in mixed]
    tokens = sum(text.n_targets(0, text.n_windows) for text in held_out)
    (one,), (two,) = (events_of(runs / str(ranks) / "mixture", "eval") for ranks in (1, 2))
    assert one["eval_tokens"] == two["eval_tokens"] == tokens
    assert one["eval_bpb"] == pytest.approx(two["eval_bpb"], rel=1e-5) and one["unigram_bpb"] == two["unigram_bpb"]


# -- another text ------------------------------------------------------------------------------------------


def test_another_text_is_read_from_its_beginning_and_the_earlier_one_goes_on_where_it_was_left(runs, corpus, mixed):
    folder = runs / "1" / "texts"
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert [row["samples"] for row in rows] == [8, 16, 8, 16, 24, 32]
    assert [row["tokens"] for row in rows] == [8 * 32 * step for step in range(1, 7)]
    first, second = (
        PackedTokens({str(text): 1.0}, split="train", max_seq_len=32, seed=7) for text in (corpus, next(iter(mixed)))
    )
    lengths = [text.n_windows for text in (first, first, second, second, first, first)]
    assert [row["epoch"] for row in rows] == pytest.approx(
        [row["samples"] / n for row, n in zip(rows, lengths, strict=True)]
    )
    launches = [row["data_fingerprint"] for row in read_rows(folder / "metrics.jsonl") if "config" in row]
    assert launches == [first.fingerprint, second.fingerprint, first.fingerprint]
    middle, last = (read_run_state(folder / name) for name in ("step_4", "step_6"))
    assert middle.earlier_texts == [
        {
            "data_fingerprint": first.fingerprint,
            "max_seq_len": 32,
            "samples_consumed": 16,
            "epoch": 16 / first.n_windows,
            "epoch_offset": 0.0,
            "skipped": [],
        }
    ]
    assert [text["data_fingerprint"] for text in last.earlier_texts] == [second.fingerprint]
    assert (last.samples_consumed, last.data_fingerprint) == (32, first.fingerprint)
    printed = (runs / "1" / "output.txt").read_text()
    assert "the new text is read at the beginning; the earlier one was left after 16 windows" in printed
    assert "the new text is read at its window 16; the earlier one was left after 16 windows" in printed


def test_a_step_of_a_new_text_is_replayed_from_the_checkpoint_before_it(runs):
    folder = runs / "1" / "texts"
    (trained,) = trainings_of(folder, 3)
    windows = rerun_step(trained, checkpoint_before(folder, 3), same_data=True)
    assert [window.sample for window in windows] == list(range(8))
    losses = sum(window.loss * window.targets for window in windows) / sum(window.targets for window in windows)
    assert losses == pytest.approx(trained.row["loss"], rel=1e-5)


def test_ruled_out_samples_stay_with_their_text_and_count_as_rollbacks(runs, mixed):
    state = replace(read_run_state(runs / "1" / "texts" / "step_2"), skipped=[[8, 8]], epoch_offset=1.5)
    second, shorter = (
        PackedTokens({next(iter(mixed)): 1.0}, split="train", max_seq_len=length, seed=7) for length in (32, 16)
    )
    there = position_in_text(state, second)
    assert (there.samples_consumed, there.skipped, there.epoch_offset, there.epoch) == (0, [], 0.0, 0.0)
    assert Progress.from_state(there).rollbacks == 1
    assert position_in_text(there, second) == there
    assert position_in_text(replace(there, samples_consumed=3), shorter).samples_consumed == 6
    for damaged in (
        [{}],
        [{**there.earlier_texts[0], "samples_consumed": "x", "data_fingerprint": shorter.fingerprint}],
    ):
        with pytest.raises(CheckpointError, match="unusable position"):
            position_in_text(replace(state, earlier_texts=damaged), shorter)


# -- the receipt of a replay -------------------------------------------------------------------------------


def test_the_receipt_names_what_has_changed_since_the_steps_were_trained_first(runs):
    folder = runs / "1" / "replayed"
    paths = [*sorted((folder / "segments").glob("metrics_*.jsonl")), folder / "metrics.jsonl"]
    receipts = [row for path in paths for row in read_rows(path) if row.get("event") == "receipt"]
    assert [receipt["compared"] for receipt in receipts] == [2, 2, 2, 2]
    same, reference, two_ranks, two_again = (receipt["changed"] for receipt in receipts)
    assert same == {} and receipts[0]["identical"]
    chosen = {"kernels": ["chunked", "reference"], "training.backend": ["auto", "reference"]}
    assert reference == chosen and two_ranks == {"ranks": [1, 2]}
    assert two_again == {} and receipts[3]["identical"]  # step_2 was saved by one rank, but two trained these steps
    alone, together = ((runs / ranks / "output.txt").read_text() for ranks in "12")
    assert "changed since step_2: training.backend: 'auto' -> 'reference' (rounds differently)" in alone
    assert "changed since the last launch: kernels 'chunked' -> 'reference' (rounds differently)" in alone
    assert "kernels 'chunked' -> 'reference', training.backend 'auto' -> 'reference'" in alone
    assert "step_2 was saved by 1 rank(s) at ZeRO" in together and "(rounds differently)" in together
    assert re.search(r"resume receipt: 2 replayed steps, .*ranks 1 -> 2", together)
    assert "numbers may differ, because these changed: ranks" in receipt_words(receipts[2])


def test_other_kernels_chosen_by_auto_and_another_device_are_named():
    now = {"ranks": 1, "kernels": "chunked", "device": "CPU", "torch": "2"}
    before = {"ranks": 1, "kernels": "triton", "device": "NVIDIA H100", "torch": "2", "unknown": 3}
    changed = differences([before, {"kernels": None}], now)
    assert changed == {"kernels": ["triton", "chunked"], "device": ["NVIDIA H100", "CPU"]}
    assert differences([of_run({"world_size": 2, "zero_stage": 1, "backend": "triton"})], now) == {
        "ranks": [2, 1],
        "kernels": ["triton", "chunked"],
    }
    receipt = ReplayReceipt([{"step": 2, "loss": 1.0}], changed)
    event = receipt.compare({"step": 2, "loss": 1.5})
    assert "Numbers may differ, because these have changed since: kernels 'triton' -> 'chunked', device" in describe(
        event
    )
