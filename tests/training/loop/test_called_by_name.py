"""What a resume, a score and a tracked run are called is what they are: one launch per number of ranks, real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import documents
from support.launching import Case, run_cases
from support.tiny_dataset import write_dataset

from training.data.dataset import PackedTokens
from training.record.metrics_log import read_rows


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
