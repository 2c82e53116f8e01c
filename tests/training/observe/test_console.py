"""What the terminal shows: start banner, progress, log levels, closing summary; mostly from real runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import pytest
from support.launching import start_training, train_alone

from training import train
from training.observe.console import Console, text_chart
from training.record.metrics_log import read_rows


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_ctrl_c_saves_and_ends_the_run_normally(launcher, tmp_path, tiny_yaml):
    """A terminal signals every process of its foreground group, and DeepSpeed's launcher signals the ranks twice more."""
    run = tmp_path / "run"
    argv = [
        "--config",
        str(tiny_yaml),
        "--output_dir",
        str(run),
        "training.max_steps=100000",
        "training.eval_interval=1",
    ]
    process = start_training(1, argv, launcher=launcher)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    while len(read_rows(run / "metrics.jsonl")) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=180)[0]
    rows = read_rows(run / "metrics.jsonl")
    assert rows[-1]["event"] == "stop" and rows[-1]["reason"] in ("SIGINT", "SIGTERM"), output
    assert (run / "latest").read_text().strip() == f"step_{rows[-1]['step']}" and "error:" not in output, output
    events = [row["event"] for row in rows if row["step"] == rows[-1]["step"] and row.get("event") in ("save", "eval")]
    assert events == ["save"]  # whoever stops a run does not wait for the evaluation; the resume makes up for it
    if launcher == "python":  # DeepSpeed's launcher prints a traceback of its own and exits with 1
        assert process.returncode == 0 and "Traceback" not in output


def test_a_damaged_line_of_metrics_is_refused_before_anything_starts(a_run, tmp_path, tiny_yaml, capsys):
    shutil.copytree(a_run, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join([*lines[:4], "nonsense\n", *lines[4:]]))
    code = train.main(["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run"), "--resume_from", "auto"])
    assert code == 3 and "metrics.jsonl, line 5: not JSON" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"  # untouched


@pytest.fixture(scope="module")
def printed(tmp_path_factory, tiny_yaml) -> dict[str, str]:
    """What each level prints for two steps of one rank."""
    folder = tmp_path_factory.mktemp("console")
    found = {}
    for level in ("info", "warning"):
        done = train_alone(
            [
                "--config",
                str(tiny_yaml),
                "--output_dir",
                str(folder / level),
                "--log_level",
                level,
                "training.max_steps=2",
                "training.log_interval=1",
            ]
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[level] = done.stdout + done.stderr
    return found


def test_the_banner_fits_one_screen_and_describes_the_run(printed):
    lines = printed["info"].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("GSA trainer"))
    names = [re.match(r"  (\w+) +\S", line)[1] for line in lines[start + 1 : start + 8]]
    assert names == ["model", "data", "batch", "zero", "device", "predicted", "folder"]
    assert all(len(line) <= 200 for line in lines[start : start + 8])
    assert "8 windows = 1 ranks x 2 x 4 accumulation; 256 tokens per step, 2 steps" in printed["info"]
    assert re.search(r"device +1 x CPU, \d+ GiB, [\d.]+ TFLOP/s \(measured\); kernels: chunked", printed["info"])


def test_steps_evaluations_saves_and_the_end_have_a_line_each(printed):
    for pattern in (
        r"^step 1/2  loss",
        r"^step 2/2  loss",
        r"^step 2: held-out [\d.]+ bits per byte",
        r"^saved step_2:",
        r"^done$",
        r"^  ended +finished at step 2, 2 steps",
        r"^  checkpoint +step_2$",
    ):
        assert len(re.findall(pattern, printed["info"], re.M)) == 1, pattern


def test_a_run_without_warnings_prints_nothing_at_level_warning(printed):
    assert printed["warning"].strip() == ""


def test_every_level_prints_warnings(capsys):
    Console(10, level="warning").warn("beware")
    Console(10, level="warning").line("not this")
    assert capsys.readouterr().out == "warning: beware\n"


def test_no_bar_under_ci(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("CI", "true")
    row = {
        "step": 10,
        "loss": 1.0,
        "indexer_loss": 0.1,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 5.0,
        "epoch": 0.1,
    }
    Console(20).step(row, eta_s=1)
    out = capsys.readouterr()
    assert out.out.startswith("step 10/20") and not out.err


def test_a_text_chart_shows_a_falling_loss():
    lines = text_chart([float(10 - i) for i in range(10)], width=10, height=5, label="loss").splitlines()
    assert lines[0] == "loss"
    assert lines[1].startswith("  10.000 |*") and lines[-1].startswith("   1.000 |")
    assert lines[-1].rstrip().endswith("*")
    assert sum(line.count("*") for line in lines) == 10
    assert "nothing to draw" in text_chart([float("nan")], label="loss")


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    row = {
        "step": 41,
        "loss": 2.5,
        "lr": 1e-3,
        "tokens_per_s": 1234.0,
        "indexer_loss": 0.1,
        "grad_norm": 1.0,
        "epoch": 0.5,
    }
    quiet = Console(80, log_interval=20)
    for step in range(38, 62):
        quiet.step({**row, "step": step}, eta_s=3725)
    out = capsys.readouterr()
    assert [line.split()[1] for line in out.out.splitlines()] == ["40/80", "60/80"] and not out.err
    assert "ETA 1:02:05" in out.out
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    bar = Console(80)
    bar.step(row, eta_s=1)
    bar.line("step 41: saved step_41")
    bar.close()
    out = capsys.readouterr()
    assert "41/80" in out.err and "loss 2.5000" in out.err and "1,234 tok/s" in out.err
    assert "saved step_41" in out.out + out.err
    monkeypatch.setenv("CI", "true")  # CI logs get lines even where stderr claims to be a terminal
    under_ci = Console(80, log_interval=1)
    under_ci.step(row, eta_s=1)
    out = capsys.readouterr()
    assert out.out.startswith("step 41/80") and not out.err
