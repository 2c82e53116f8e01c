"""`--resume_from auto` never starts over by itself: only where there never was a checkpoint, or with --fresh."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.launching import Case, run_cases

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from training import train
from training.checkpointing.resume import find_checkpoint
from training.config.command import run_command
from training.record.metrics_log import read_rows
from training.record.run_folder import RunFolder


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 16
    path.write_bytes(raw)


def damage_all(run: Path) -> None:
    for path in run.glob("step_*/model.safetensors"):
        flip(path)


def lose_all(run: Path) -> None:
    for path in run.glob("step_*"):
        shutil.rmtree(path)


def lose_manifests(run: Path) -> None:
    for path in run.glob("step_*/manifest.json"):
        path.unlink()


def an_empty_mount(run: Path) -> None:
    lose_all(run)
    (run / "latest").unlink()


@pytest.mark.parametrize("broken", [damage_all, lose_all, lose_manifests, an_empty_mount])
def test_auto_is_refused_with_the_list_where_no_checkpoint_is_good(a_run, tmp_path, tiny_yaml, capsys, broken):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    broken(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    argv = ["--config", str(tiny_yaml), "--output_dir", str(run), "--resume_from", "auto"]
    assert train.main(argv) == 3
    printed = capsys.readouterr().err
    assert "has had checkpoints, and none of them is good:\n  step_6: " in printed and "\n  step_3: " in printed
    assert "never starts over by itself" in printed and "--fresh" in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_auto_starts_a_run_where_only_a_first_save_was_interrupted(tmp_path):
    torn = tmp_path / "step_5"
    torn.mkdir()
    (torn / "mp_rank_00_model_states.pt").write_bytes(b"half")
    assert find_checkpoint("auto", RunFolder(tmp_path)) is None
    (torn / "manifest.json").write_text("{")  # this one was complete, and its manifest is damaged
    with pytest.raises(CheckpointError, match="step_5: "):
        find_checkpoint("auto", RunFolder(tmp_path))


def test_fresh_begins_again_and_moves_everything_aside(a_run, tmp_path, tiny_yaml):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    damage_all(run)
    argv = ("--config", str(tiny_yaml), "--output_dir", str(run), "--fresh", "training.max_steps=2")
    run_cases(1, [Case("fresh", argv)], tmp_path)
    assert sorted(path.name for path in run.glob("step_*")) == ["step_2"] and manifest.latest_tag(run) == "step_2"
    assert sorted(path.name for path in (run / "segments").glob("step_*")) == ["step_3.0", "step_6.0"]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row] == [1, 2]
    moved = [row["step"] for row in read_rows(run / "segments" / "metrics_0.jsonl") if "loss" in row]
    assert moved == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "run.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume_from", ""], "what follows --resume_from is empty"),
        (["--resume_from="], "--resume_from is empty"),
        (["--fresh", "--resume_from", "auto"], "--fresh starts over and --resume_from goes on"),
        (["--deepspeed_config", ""], "what follows --deepspeed_config is empty"),
        (["training.init_from="], "training.init_from is empty; is a variable unset"),
        (["training.init_from=''"], "training.init_from is empty; give a value, or null"),
        (["data.data_dir=''"], "data.data_dir is empty; give a value"),
        ([""], "is empty"),
    ],
)
def test_an_empty_value_is_refused_and_never_means_start_over(a_run, tmp_path, tiny_yaml, capsys, argv, words):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    before = sorted(run.rglob("*"))
    assert train.main(["--config", str(tiny_yaml), "--output_dir", str(run), *argv]) == 2
    assert words in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("argv", [[""], ["--out", ""], ["--out="]])
def test_every_command_refuses_an_empty_value(argv, capsys):
    assert run_command(lambda argv: pytest.fail("it went on"), argv) == 2
    assert "is empty; is a variable unset" in capsys.readouterr().err


def test_an_empty_prompt_is_a_prompt():
    assert run_command(lambda argv: len(argv), ["--prompt", ""]) == 2 and run_command(len, ["--prompt="]) == 1
