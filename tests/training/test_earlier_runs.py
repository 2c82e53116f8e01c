"""Runs made by commit 625a451, before `training/` was divided into wings, go on under today's code.

tests/fixtures/run_625a451/runs.tar.xz holds two runs of two ranks (ZeRO 2 in float32, ZeRO 3 in bf16), stopped after
10 steps, resumed from step_8 and finished at 12, with evaluations, completions and a discarded branch. Everything here
goes through the commands, so that no rename can hide a break.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from support.launching import ROOT, Case, rank_environment, run_cases

FIXTURE = ROOT / "tests" / "fixtures" / "run_625a451"
RUNS = ("zero2_2ranks_fp32", "zero3_2ranks_bf16")
TIMES = ("time", "mfu", "tokens_per_s", "tokens_per_s_per_device", "memory_gib")


def unpack(folder: Path) -> Path:
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """Both runs, continued from step_8 to the end once more."""
    base = unpack(tmp_path_factory.mktemp("resumed"))
    run_cases(
        2,
        [
            Case(
                name,
                (
                    "--config",
                    str(FIXTURE / "tiny.yaml"),
                    "--output_dir",
                    str(base / name),
                    "--resume_from",
                    "step_8",
                    "--deepspeed_config",
                    str(ROOT / "ds_configs" / f"{name[:5]}.json"),
                    f"training.precision={name[-4:]}",
                ),
            )
            for name in RUNS
        ],
        base,
    )
    return base


def rows_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (k in TIMES or "seconds" in k)} for row in rows if "loss" in row]


def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("run", RUNS)
def test_it_resumes_to_the_rows_that_it_had(runs, resumed, run):
    before, now = rows_of(runs / run), rows_of(resumed / run)
    assert [row["step"] for row in now] == list(range(1, 13))
    assert [row.keys() for row in now] == [row.keys() for row in before]
    compare(before, now, "metrics.jsonl", bf16="bf16" in run)


@pytest.mark.parametrize("run", RUNS)
def test_it_ends_with_the_same_checkpoint(runs, resumed, run):
    names = sorted(path.name for path in (runs / run / "step_12").iterdir())
    assert {path.name for path in (resumed / run / "step_12").iterdir()} == {*names, "tokenizer.json"}  # since then
    for name in (n for n in names if n.endswith("optim_states.pt")):
        old, new = (torch.load(base / run / "step_12" / name, weights_only=False) for base in (runs, resumed))
        compare(old, new, name, bf16="bf16" in run)


def compare(old, new, where: str, *, bf16: bool) -> None:
    """Equal but for rounding: the fixtures were made on another processor, whose sums have another order.

    In bf16, one sum that rounds the other way moves a number by 2^-8 of itself.
    """
    rel, tiny = (1e-2, 1e-4) if bf16 else (1e-5, 1e-7)
    if isinstance(old, torch.Tensor):
        torch.testing.assert_close(new, old, rtol=rel, atol=tiny, msg=lambda text: f"{where}: {text}")
    elif type(old) is float and "metrics" in where:
        assert new == pytest.approx(old, rel=rel, abs=tiny), where
    elif isinstance(old, dict):
        assert old.keys() == new.keys(), where
        for key in old:
            compare(old[key], new[key], f"{where}[{key!r}]", bf16=bf16)
    elif isinstance(old, (list, tuple)):
        assert len(old) == len(new), where
        for i, pair in enumerate(zip(old, new, strict=True)):
            compare(*pair, f"{where}[{i}]", bf16=bf16)
    elif isinstance(old, (int, float, str, bool, type(None))):
        assert old == new, where


@pytest.mark.parametrize("run", RUNS)
def test_its_checkpoints_verify(runs, run):
    done = command("training.verify", "--all", str(runs / run))
    assert done.returncode == 0 and "2 of 2 checkpoints are good" in done.stdout, done.stdout + done.stderr


def test_its_steps_replay_and_the_discarded_branch_too(runs):
    for run, extra in ((RUNS[0], []), (RUNS[1], ["--segment", "0"])):
        done = command("training.replay", str(runs / run), "--step", "9", *extra)
        assert done.returncode == 0, done.stderr
        assert "samples 32..35; with the weights of step_8" in done.stdout and "w" in done.stdout


def test_it_reports_with_its_resume_and_receipt(runs):
    done = command("training.report", str(runs / RUNS[0]))
    assert done.returncode == 0, done.stderr
    page = (runs / RUNS[0] / "report.md").read_text()
    assert "2 replayed" in page and "finished" in page and (runs / RUNS[0] / "report.html").stat().st_size > 20_000


def test_the_doctor_and_the_list_of_checkpoints_read_it(runs):
    done = command("training.doctor", str(runs / RUNS[1]))
    assert done.returncode == 0, done.stderr
    done = command("training.checkpoints", "list", str(runs / RUNS[1]))
    assert done.returncode == 0 and "step_8" in done.stdout and "step_12" in done.stdout, done.stderr
