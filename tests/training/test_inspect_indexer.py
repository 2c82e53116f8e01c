"""The command training.inspect_indexer on the checkpoint of a real run, and what it refuses."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from support.kernel_contract import one_thread  # noqa: F401

from training.config.command import run_command
from training.inspect_indexer import main


def test_a_checkpoint_is_measured(a_run, capsys):
    assert run_command(main, [str(a_run), "--windows", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step_6: 3 held-out windows of 32 tokens, k_base 6")
    rows = [
        [float(x) for x in re.findall(r"[\d.]+", line)] for line in out.splitlines() if re.match(r"\| \d \| 0", line)
    ]
    assert [row[0] for row in rows] == list(range(len(rows))) and len(rows) >= 2
    for _, covered, oracle, ratio, recall, random_ratio, random_recall in rows:
        assert 0 < covered <= oracle <= 1 and ratio == pytest.approx(covered / oracle, abs=2e-3)
        assert 0 <= recall <= 1 and 0 <= random_ratio <= 1 and 0 <= random_recall <= 1
    chosen = [line for line in out.splitlines() if "| selected |" in line]
    chance = [line for line in out.splitlines() if "| random |" in line]
    assert len(chosen) == len(chance) == len(rows)
    assert [c.split("|")[3] for c in chosen] == [c.split("|")[3] for c in chance]  # sets of the same size


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["--windows", "0"], 2, "--windows 0 must be at least 1"),
        (["--device", "cuda"], 2, "--device cuda: torch sees no GPU here"),
        (["--max_seq_len", "4096"], 2, "must be at least 1 and at most the model's max_position_embeddings=32"),
        (["--max_seq_len", "0"], 2, "--max_seq_len 0 must be at least 1"),
        (["--data", "nowhere"], 3, "nowhere"),
    ],
)
def test_wrong_input_is_refused(a_run, capsys, monkeypatch, argv, code, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(main, [str(a_run), *argv]) == code
    assert says in capsys.readouterr().err


def test_a_damaged_or_missing_checkpoint_is_refused(a_run, tmp_path, capsys):
    assert run_command(main, [str(tmp_path)]) == 3
    copy = tmp_path / "copy"
    shutil.copytree(a_run, copy)
    (copy / "step_6" / "model.safetensors").write_bytes(b"x")
    assert run_command(main, [str(copy / "step_6")]) == 3
    assert "model.safetensors" in capsys.readouterr().err
