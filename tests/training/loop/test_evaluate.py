"""What goes wrong in an evaluation costs no step: real engines on two ranks, at ZeRO 2 and 3."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.launching import ROOT, free_port, rank_environment, train_alone
from support.tiny_dataset import write_dataset

from gsa.checkpoint import manifest
from training.record.metrics_log import read_rows


def rows_of(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


@pytest.fixture(scope="module")
def faults(tmp_path_factory, tiny_yaml) -> tuple[Path, str]:
    """Runs with a fault in an evaluation; the folder of all, and what they printed."""
    base = tmp_path_factory.mktemp("faults")
    zero3 = ("--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json"))

    def case(name, fault, *argv, code, into=None):
        common = ["--config", str(tiny_yaml), "--output_dir", str(base / (into or name)), "training.save_interval=0"]
        return name, fault, [*common, "training.eval_windows=0", "training.max_steps=4", *argv], code

    cases = [
        case("last", "memory", "training.eval_interval=0", code=1),
        case("middle", "memory", "training.eval_interval=2", code=1),
        case("signal", "signal", "training.eval_interval=2", code=0),
        case("resumed", "none", "training.eval_interval=2", "--resume_from", "auto", code=0, into="signal"),
        # not right after the other signal, which takes its handlers away a moment later
        case("signal3", "signal", "training.eval_interval=2", *zero3, code=0),
    ]
    cases.append(case("code", "code", code=1))
    (base / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    done = subprocess.run(
        [*command, str(free_port()), str(ROOT / "tests/support/evaluate_with_a_fault.py"), str(base / "cases.json")],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return base, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "step"), [("last", 4), ("middle", 2)])
def test_an_evaluation_that_fails_on_one_rank_ends_the_run_after_its_step_was_saved(faults, name, step):
    base, output = faults
    manifest.verify(base / name / f"step_{step}")
    assert manifest.latest_tag(base / name) == f"step_{step}"
    run = json.loads((base / name / "run.json").read_text())
    assert run["status"] == "failed"
    assert "the evaluation failed on rank 1: MemoryError: out of memory in the evaluation" in run["reason"]
    assert rows_of(base / name, "eval") == []
    assert re.search(rf"{name}: rank 0 ended with 1", output) and re.search(rf"{name}: rank 1 ended with 1", output)


@pytest.mark.parametrize("name", ["signal", "signal3"])
def test_a_stop_signal_breaks_off_an_evaluation_at_its_next_batch(faults, name):
    base, output = faults
    assert set(re.findall(rf"^{name}: rank \d ended with 0 after (\d+) batches", output, re.M)) == {"3"}
    manifest.verify(base / name / "step_2")
    if name == "signal3":
        run = json.loads((base / name / "run.json").read_text())
        assert (run["status"], run["reason"], run["step"]) == ("stopped", "SIGTERM", 2)
        assert rows_of(base / name, "eval") == []


def test_the_resume_makes_up_for_the_evaluation_that_was_broken_off(faults):
    base, _ = faults
    assert [row["step"] for row in rows_of(base / "signal", "eval")] == [2, 4]


def test_an_error_of_one_rank_in_a_step_is_the_sentence_and_the_code_of_all(faults):
    """Rank 0 sees only that the connection broke."""
    base, output = faults
    sentence = "ZeroDivisionError: a bug on one rank"
    assert "error: rank 1 failed:\nTraceback" in output and re.search(rf"error: rank 1 on \S+: {sentence}", output)
    assert len(re.findall(r"^code: rank \d ended with 1 ", output, re.M)) == 2
    assert "gloo" not in output and "error: rank 0 failed" not in output[output.index(sentence) :]
    run = json.loads((base / "code" / "run.json").read_text())
    assert run["status"] == "failed" and run["reason"].endswith(sentence) and run["step"] == 1
    assert rows_of(base / "code", "error")[0]["reason"] == run["reason"]


def test_held_out_text_with_nothing_to_score_is_refused_before_training(tmp_path, tiny_yaml):
    write_dataset(tmp_path / "text", [[1, 2, 3]] * 400, vocab_size=64, held_out=[[1]] * 40)
    config = yaml.safe_load(tiny_yaml.read_text())
    config["data"]["data_dir"] = str(tmp_path / "text")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = train_alone(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")])
    assert done.returncode == 3 and "hold nothing to predict but ends of documents" in done.stderr
    assert not (tmp_path / "run").exists()
