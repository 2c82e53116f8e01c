"""Every rank of a launch holds the same run, and a refusal of one rank is that of all: real ranks, before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.launching import ROOT, Case, run_cases, start_ranks
from support.tiny_dataset import write_dataset

from training.loop.agreement import source_digest


@pytest.fixture(scope="module")
def told_differently(tmp_path_factory, tiny_yaml) -> tuple[Path, str]:
    """Runs on two ranks, of which rank 1 is told or shown something else; the folder of all, and what they printed."""
    base = tmp_path_factory.mktemp("differently")
    data = Path(yaml.safe_load(tiny_yaml.read_text())["data"]["data_dir"])
    for rank in ("rank_0", "rank_1"):
        (base / rank / "runs").mkdir(parents=True)
    shutil.copytree(data, base / "rank_0" / "text")
    write_dataset(base / "rank_1" / "text", [[1, 2, 3]] * 400, vocab_size=64, held_out=[[1, 2]] * 40)
    shutil.copytree(data, base / "rank_0" / "same")
    shutil.copytree(data, base / "rank_1" / "same")
    shutil.copytree(data, base / "rank_0" / "only_here")

    def case(name, *argv, code, rank_1=(), elsewhere=False, into=None):
        folder = into or str(base / name)
        return Case(
            name,
            ("--config", str(tiny_yaml), "--output_dir", folder, "training.max_steps=2", *argv),
            code,
            rank_1,
            str(base / "rank_1") if elsewhere else None,
        )

    cases = [
        case("clip", code=2, rank_1=("training.grad_clip=0.01",)),
        case("stage", code=2, rank_1=("--deepspeed_config", str(ROOT / "ds_configs" / "zero1.json"))),
        case("micro", code=2, rank_1=("training.micro_batch_size=1",)),
        case("text", "data.data_dir=text", code=3, elsewhere=True),
        case("no_text", "data.data_dir=only_here", code=3, elsewhere=True),
        case("folder", "data.data_dir=same", code=2, elsewhere=True, into="runs/run"),
        case("agreed", "data.data_dir=same", code=0, elsewhere=True),
    ]
    output = run_cases(2, cases, base, cwd=base / "rank_0")
    return base, output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip", "training.grad_clip: 1.0 on rank 0"),
        ("stage", "DeepSpeed's zero_optimization.stage: 2 on rank 0"),
        ("micro", "training.micro_batch_size: 2 on rank 0"),
        ("text", "the ranks do not have the same text under text:\n  training text: "),
        ("no_text", "error: rank 1 on "),
        ("folder", "--output_dir runs/run is not one folder: rank 1 on "),
    ],
)
def test_ranks_that_hold_different_runs_are_refused_once_and_nothing_is_written(told_differently, name, words):
    base, output = told_differently
    assert output.count(words) == 1, output[-6000:]
    assert not (base / name).exists()
    assert not (base / "rank_0" / "runs" / "run").exists() and not list((base / "rank_1" / "runs").iterdir())


def test_ranks_with_the_same_text_in_different_places_train(told_differently):
    base, _ = told_differently
    assert json.loads((base / "agreed" / "run.json").read_text())["status"] == "finished"
    assert not list((base / "agreed").glob(".same_folder*"))


@pytest.mark.parametrize(
    ("argvs", "code", "words"),
    [
        ((["training.max_steps=0"], []), 2, "training.max_steps=0"),
        (([], ["training.max_steps=0"]), 2, "training.max_steps=0"),
        (([], ["--no_such_flag"]), 2, "its command line is refused"),
        ((["data.data_dir=nowhere"], []), 3, "nowhere"),
    ],
    ids=["rank 0", "rank 1", "command line of rank 1", "data of rank 0"],
)
def test_what_one_rank_refuses_ends_all_with_its_sentence_and_code(tmp_path, tiny_yaml, argvs, code, words):
    """Nobody ends the other rank here, as across hosts: it must hear of the refusal."""
    common = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run")]
    # each rank as if alone on its host, so that both print
    ranks = start_ranks([[*common, *argv] for argv in argvs], {"LOCAL_RANK": "0"})
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], outputs
    sentences = [[line for line in output.splitlines() if line.startswith("error:")] for output in outputs]
    assert sentences[0] == sentences[1] and len(sentences[0]) == 1 and words in sentences[0][0]
    assert not any("Traceback" in output for output in outputs) and not (tmp_path / "run").exists()


def test_the_digest_of_the_sources_covers_every_source_file(tmp_path):
    for package in ("gsa", "training"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    copies = (tmp_path / "gsa", tmp_path / "training")
    before = source_digest(copies)
    assert source_digest() == before
    changed = tmp_path / "training" / "loop" / "step.py"
    changed.write_text(changed.read_text() + "\n")
    assert source_digest(copies) != before
