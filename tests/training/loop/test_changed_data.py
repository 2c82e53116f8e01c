"""Text that changes under a run: all ranks end with exit code 3, nothing more is saved, and the file is named."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from support.launching import Case, run_cases

from training.data.dataset import DataError
from training.loop.preflight import prepare
from training.train import parse


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_yaml, corpus) -> tuple[Path, str]:
    """The folder of a launch of two ranks with three cases, and what they printed."""
    base = tmp_path_factory.mktemp("changed")
    for name in ("flipped", "cut"):
        shutil.copytree(corpus, base / name)
    shard = base / "flipped" / "train" / "shard_00002.bin"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)

    def case(name: str, data: Path, code: int, *more: str, **options) -> Case:
        argv = ("--config", str(tiny_yaml), "--output_dir", str(base / f"run_{name}"), f"data.data_dir={data}")
        return Case(name, (*argv, "training.eval_interval=0", "training.probe_interval=0", *more), code, **options)

    cases = [
        case("good", corpus, 0, patches={"training.data.dataset.AT_ONCE_BYTES": 0}),
        case(
            "flipped",
            base / "flipped",
            3,
            "training.max_steps=3000",
            "training.save_interval=2000",
            patches={"training.data.dataset.AT_ONCE_BYTES": 0},
        ),
        case("cut", base / "cut", 3, "training.max_steps=3000", "training.save_interval=2000"),
    ]

    def cut_off() -> None:
        metrics = base / "run_cut" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"loss"') > 2) and not done.wait(0.05):
            pass
        for path in (base / "cut" / "train").glob("*.bin"):
            os.truncate(path, 0)

    done = threading.Event()
    cutter = threading.Thread(target=cut_off)
    cutter.start()
    try:
        output = run_cases(2, cases, base)
    finally:
        done.set()
        cutter.join()
    return base, output


def test_good_shards_are_read_in_the_background_and_remembered(launch, corpus):
    assert (launch[0] / "run_good" / "step_6" / "manifest.json").exists()
    known = [json.loads(path.read_text()) for path in (corpus / "packed").glob("verified_*_of_2.json")]
    assert known or list((corpus / "packed").glob("verified_at_start.json"))


@pytest.mark.parametrize("name, says", [("flipped", "its sha256 is not that of the manifest"), ("cut", "was cut off")])
def test_a_changed_shard_ends_the_run_on_all_ranks_before_a_save(launch, name, says):
    base, output = launch
    lines = [line for line in output.splitlines() if "error: rank" in line and f"{name}/train/shard" in line]
    assert len(lines) == 2 and all(says in line for line in lines), output
    assert not list((base / f"run_{name}").glob("step_*"))
    run = json.loads((base / f"run_{name}" / "run.json").read_text())
    assert run["status"] == "failed" and f"{name}/train/shard_0" in run["reason"] and says in run["reason"]


def test_changed_bytes_are_refused_before_the_first_step(tiny_yaml, corpus, tmp_path):
    """What shard_bytes.sh did: 2.15 became 0.26 bits per byte without a word."""
    data = shutil.copytree(corpus, tmp_path / "data")
    argv = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run"), f"data.data_dir={data}"]
    for name in ("train/shard_00001.bin", "held_out/shard_00000.bin", "tokenizer.json"):
        good = (data / name).read_bytes()
        (data / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{data / name}: its sha256 is not that of the manifest"):
            prepare(parse(argv))
        (data / name).write_bytes(good)
    assert prepare(parse(argv)).spec.cfg.data.data_dir == str(data)
