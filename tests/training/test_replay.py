"""The command training.replay, and the completions that a run logs, on a real run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.launching import ROOT, Case, run_cases

from gsa.attention.cache import Cache
from gsa.generation import load_model
from training.config import load_config
from training.config.command import run_command
from training.data import DataError
from training.data.open import open_data
from training.record.metrics_log import read_rows
from training.replay import main


def row_of(run: Path, step: int) -> dict:
    return next(row for row in read_rows(run / "metrics.jsonl") if "loss" in row and row["step"] == step)


def test_the_step_after_a_checkpoint_is_run_again_to_its_loss(a_run, capsys):
    assert main([str(a_run), "--step", "4"]) == 0
    out = capsys.readouterr().out
    head = re.match(r"step 4: loss ([\d.]+) then, .* samples 24\.\.31; with the weights of step_3: ([\d.]+)", out)
    assert float(head[1]) == pytest.approx(row_of(a_run, 4)["loss"], abs=1e-4)
    assert float(head[2]) == pytest.approx(float(head[1]), abs=2e-4)
    ranks = dict(re.findall(r"^sample (\d+) \(rank (\d)", out, re.M))
    assert sorted(map(int, ranks)) == list(range(24, 32)) and set(ranks.values()) == {"0", "1"}
    losses = [float(x) for x in re.findall(r"^sample .*?: loss ([\d.]+)", out, re.M)]
    assert losses == sorted(losses, reverse=True)
    assert len(re.findall(r"^    w\d+ w\d+", out, re.M)) == 8


def test_a_step_of_a_discarded_branch_is_found(a_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(rows) if '"step": 5, "epoch"' in line)
    (run / "segments").mkdir(exist_ok=True)
    (run / "segments" / "metrics_0.jsonl").write_text("".join(rows[at:]))
    (run / "metrics.jsonl").write_text("".join(rows[:at]))
    assert main([str(run), "--step", "6"]) == 0
    assert "samples 40..47; with the weights of step_3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, code, words", [(["--step", "99"], 2, "no step 99"), (["--step", "2"], 3, "no checkpoint before step 2")]
)
def test_wrong_input_is_refused(a_run, argv, code, words, capsys):
    assert run_command(main, [str(a_run), *argv]) == code
    assert words in capsys.readouterr().err
    assert run_command(main, [str(a_run / "step_3"), "--step", "1"]) == 3


def test_a_step_is_run_again_with_the_configuration_of_its_own_launch(a_run, tmp_path, capsys):
    """config.yaml and run.json are of the newest launch, which may have another batch, length and number of ranks."""
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("global_batch_size: 8", "global_batch_size: 4")
    )
    (run / "run.json").write_text((run / "run.json").read_text().replace('"world_size": 2', '"world_size": 1'))
    assert main([str(run), "--step", "4"]) == 0
    out = capsys.readouterr().out
    assert "samples 24..31" in out and "(rank 1;" in out


def test_each_training_of_a_step_can_be_shown(a_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    discarded = row_of(run, 5) | {"samples": 80, "loss": "nan"}
    (run / "segments").mkdir(exist_ok=True)
    (run / "segments" / "metrics_0.jsonl").write_text(json.dumps(discarded) + "\n")
    assert main([str(run), "--step", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("also trained: --segment 0, loss nan, samples up to 79\nstep 5: ") and "samples 32..39" in out
    assert main([str(run), "--step", "5", "--segment", "0"]) == 0
    out = capsys.readouterr().out
    assert "also trained: in metrics.jsonl" in out and "step 5: loss nan then" in out and "samples 72..79" in out
    assert run_command(main, [str(run), "--step", "5", "--segment", "7"]) == 2
    assert "it is in metrics.jsonl, segment 0" in capsys.readouterr().err


def test_a_missing_tokenizer_and_a_row_without_samples_are_refused(a_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    source = Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["data_dir"])
    shutil.copytree(source, tmp_path / "text")
    (tmp_path / "text" / "tokenizer.json").unlink()
    lines = (run / "metrics.jsonl").read_text().replace(json.dumps(str(source)), json.dumps(str(tmp_path / "text")))
    (run / "metrics.jsonl").write_text(lines)
    assert run_command(main, [str(run), "--step", "4"]) == 3
    assert "tokenizer.json is missing" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text(lines.replace('"samples": 32, ', ""))
    assert run_command(main, [str(run), "--step", "4"]) == 2
    assert "has no samples" in capsys.readouterr().err


def test_a_step_is_run_again_without_the_held_out_text(a_run, tmp_path, capsys):
    run, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(a_run, run)
    source = Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["data_dir"])
    shutil.copytree(source, text)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_text((run / name).read_text().replace(str(source), str(text)))
    shutil.rmtree(text / "held_out")
    with pytest.raises(DataError):
        open_data(load_config(run / "config.yaml", []))
    assert main([str(run), "--step", "4"]) == 0
    assert "samples 24..31; with the weights of step_3" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_logged_completions_are_the_greedy_ones_of_the_checkpoint(stage, tmp_path, tiny_yaml):
    run_cases(
        2,
        [
            Case(
                "samples",
                (
                    "--config",
                    str(tiny_yaml),
                    "--output_dir",
                    str(tmp_path / "run"),
                    "training.max_steps=2",
                    "training.sample_interval=2",
                    "training.sample_prompts=[w3 w5,w7]",
                    "training.sample_tokens=6",
                    "--deepspeed_config",
                    str(ROOT / "ds_configs" / f"{stage}.json"),
                ),
            )
        ],
        tmp_path,
    )
    samples = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "sample"]
    assert [row["prompt"] for row in samples] == ["w3 w5", "w7"]
    model = load_model(tmp_path / "run" / "step_2")
    for row in samples:
        tokens = [int(word[1:]) for word in row["prompt"].split()]
        with torch.no_grad():
            cache, new = Cache(model.config, 1, 32), tokens
            words = []
            for _ in range(6):
                token = int(model(torch.tensor([new]), cache=cache, last_only=True).logits[0, -1].argmax())
                if token == 63:
                    break
                words.append(f"w{token}")
                new = [token]
        assert row["text"].split() == words
