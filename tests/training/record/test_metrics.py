"""metrics.jsonl reads as one curve after kills and resumes, and docs/metrics.md is generated from the tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.launching import ROOT, rank_environment

from training.record import metrics_log
from training.record.metric_schema import schema
from training.record.metrics_log import MetricsLog, read_rows, require_rows, rewind, rows_after, rows_from_end


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


@st.composite
def curves(draw) -> tuple[list[dict], str]:
    """Rows as a run writes them, saves late, and the end of a line that a kill has torn."""
    rows = [{"event": "start", "step": 0}]
    for number in range(1, draw(st.integers(0, 9)) + 1):
        rows.append(step(number))
        for event in draw(st.lists(st.sampled_from(["eval", "save", "spike"]), max_size=2)):
            behind = draw(st.integers(0, min(2, number))) if event == "save" else 0
            rows.append({"event": event, "step": number - behind, "text": "ü" * draw(st.integers(0, 9))})
    return rows, draw(st.sampled_from(["", '{"step": 99, "lo', '{"step": 99, "event": "x"}', "nonsense\n", "\0\0\0"]))


def split_by_the_rule(rows: list[dict], at: int) -> tuple[list[dict], list[dict]]:
    """(rows that stay, rows that move), of a whole pass from the first row on."""
    stay, moved = [], []
    for row in rows:
        late_save = row.get("event") == "save" and row["step"] <= at
        goes = moved or ("loss" in row and row["step"] > at)
        (moved if goes and not late_save else stay).append(row)
    return stay, moved


@given(curves(), st.integers(0, 10), st.sampled_from([1, 7, 64, 64 * 1024]))
def test_what_is_read_from_the_end_is_what_a_whole_pass_reads(curve, at, block):
    rows, torn = curve
    folder = Path(tempfile.mkdtemp())
    path = folder / "metrics.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "BLOCK", block)
        write(path, rows, torn)
        rows = read_rows(path)
        assert list(rows_from_end(path)) == rows[::-1]
        after = list(rows_after(path, at))
        assert after == rows[len(rows) - len(after) :]
        assert [row["step"] for row in after if "loss" in row] == [
            r["step"] for r in rows if "loss" in r and r["step"] > at
        ]
        stay, moved = split_by_the_rule(rows, at)
        assert rewind(path, at) == moved
        assert path.read_text() == "".join(json.dumps(row) + "\n" for row in stay)
        assert not moved or read_rows(folder / "segments" / "metrics_0.jsonl") == moved
    shutil.rmtree(folder)


def test_damage_found_from_the_end_has_the_same_line_number(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    for block in (3, 64 * 1024):
        monkeypatch.setattr(metrics_log, "BLOCK", block)
        path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n{"step": 3}\n')
        for read in (require_rows, lambda path: list(rows_from_end(path)), lambda path: rewind(path, 1)):
            with pytest.raises(metrics_log.DamagedRowsError, match=r"metrics.jsonl, line 2: not JSON"):
                read(path)
    missing = tmp_path / "none.jsonl"
    assert list(rows_from_end(missing)) == list(rows_after(missing, 3)) == rewind(missing, 3) == []
    missing.touch()
    assert list(rows_from_end(missing)) == list(rows_after(missing, 3)) == rewind(missing, 3) == []


def test_a_resume_parses_a_long_file_once(a_run, tiny_yaml, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    rows = read_rows(run / "metrics.jsonl")
    long_ago = [{"step": 0, "loss": 2.0, "indexer_loss": 1.0, "grad_norm": 1.0, "pad": "x" * 1000}] * 8000
    write(run / "metrics.jsonl", [rows[0], *long_ago, *rows[1:]])
    size = (run / "metrics.jsonl").stat().st_size
    command = [sys.executable, str(ROOT / "tests" / "support" / "count_reads.py"), "--config", str(tiny_yaml)]
    command += ["--output_dir", str(run), "--resume_from", "step_3", "training.save_interval=3"]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume receipt: 3 replayed steps" in done.stdout
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["rows"] < 1.25 * len([*rows, *long_ago])  # all once, and from the end what goes on from them
    assert counts["bytes"] < 2.25 * size  # once by the parser, once for the copy without the rows that move


def test_docs_metrics_is_generated_from_the_tables():
    assert (ROOT / "docs" / "metrics.md").read_text() == schema(), "run python -m training.metrics > docs/metrics.md"
