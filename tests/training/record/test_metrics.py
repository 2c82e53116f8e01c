"""metrics.jsonl reads as one curve after kills and resumes, and docs/metrics.md is generated from the tables."""

from __future__ import annotations

import json

import pytest
from support.launching import ROOT

from training.record.metric_schema import schema
from training.record.metrics_log import MetricsLog, read_rows, rewind


def write(path, rows, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def step(n):
    return {"step": n, "loss": 1.0 / n}


def test_rewind_moves_later_rows_to_segments_and_loses_none(tmp_path):
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
    log = MetricsLog(path, print)
    log.write(step(3))
    log.close()
    assert read_rows(path) == [step(1), step(2), step(3)]


def test_a_damaged_line_inside_raises_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_rows(path)


def test_non_finite_numbers_are_written_as_strings(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", print)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": "nan", "grad_norm": "inf"}]


def test_docs_metrics_is_generated_from_the_tables():
    assert (ROOT / "docs" / "metrics.md").read_text() == schema(), "run python -m training.metrics > docs/metrics.md"
