"""metrics.jsonl reads as one curve, whatever was killed or resumed."""

from __future__ import annotations

import json

import pytest
from support.launching import ROOT

from training.observe.console import Console, text_chart
from training.record.metric_schema import schema
from training.record.metrics_log import MetricsLog, read_rows, rewind


def write(path, rows, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def step(n):
    return {"step": n, "loss": 1.0 / n}


def test_rewind_keeps_one_curve_and_loses_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"event": "start", "step": 0},
        step(1),
        step(2),
        {"event": "save", "step": 2},
        step(3),
        {"event": "eval", "step": 3},
    ]
    write(path, rows)
    assert len(rewind(path, 2)) == 2
    assert read_rows(path) == rows[:4]
    assert read_rows(tmp_path / "segments" / "metrics_0.jsonl") == rows[4:]
    assert len(rewind(path, 1)) == 2
    assert read_rows(path) == rows[:2]
    assert read_rows(tmp_path / "segments" / "metrics_1.jsonl") == rows[2:4]


def test_a_torn_last_line_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)], torn='{"step": 3, "lo')
    assert read_rows(path) == [step(1), step(2)]
    assert rewind(path, 2) == []
    log = MetricsLog(path)
    log.write(step(3))
    log.close()
    assert read_rows(path) == [step(1), step(2), step(3)]


def test_a_broken_line_inside_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_rows(path)


def test_numbers_that_json_lacks_survive_as_words(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": "nan", "grad_norm": "inf"}]


def test_the_schema_is_the_tables():
    assert (ROOT / "docs" / "metrics.md").read_text() == schema(), "run python -m training.metrics > docs/metrics.md"


def test_chart_shows_the_fall():
    lines = text_chart([float(10 - i) for i in range(10)], width=10, height=5, label="loss").splitlines()
    assert lines[0] == "loss"
    assert lines[1].startswith("  10.000 |*") and lines[-1].startswith("   1.000 |")
    assert lines[-1].rstrip().endswith("*")
    assert sum(line.count("*") for line in lines) == 10
    assert "nothing to draw" in text_chart([float("nan")], label="loss")


def test_the_bar_shows_steps_loss_and_eta_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
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
    monkeypatch.setenv("CI", "true")  # a log of CI is no terminal, even where it claims to be one
    under_ci = Console(80, log_interval=1)
    under_ci.step(row, eta_s=1)
    out = capsys.readouterr()
    assert out.out.startswith("step 41/80") and not out.err
