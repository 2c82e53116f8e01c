"""Real launchers: what happens when a rank dies or hangs, and what is refused before any rank has met another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from helpers_dataset import write_dataset
from launching import start_training, train_alone

WAIT_S = 60
"""The promise: a rank that dies or hangs is reported within a minute."""


def started(tmp_path: Path, tiny_yaml: Path, *extra: str):
    """Two ranks under `deepspeed`, a few steps into a long run; and the process ids of the ranks."""
    folder = tmp_path / "run"
    process = start_training(2, [
        "--config", str(tiny_yaml), "--output_dir", str(folder), "training.max_steps=1000000", "training.eval_interval=0", *extra,
    ])  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count('"loss"') < 5:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)  # every rank's watchdog has read the others' files
    pids = [json.loads((folder / ".ranks" / f"rank_{r}.json").read_text())["pid"] for r in (0, 1)]
    return process, folder, pids


def test_a_rank_that_is_killed_is_named_within_a_minute(tmp_path, tiny_yaml):
    process, folder, pids = started(tmp_path, tiny_yaml)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=WAIT_S)[0]
    assert time.monotonic() - began < WAIT_S and process.returncode != 0
    assert f"rank 1 (pid {pids[1]} on" in output and "died" in output, output[-3000:]
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_rank_that_stops_is_named_with_stacks_within_a_minute(tmp_path, tiny_yaml):
    process, folder, pids = started(tmp_path, tiny_yaml, "training.hang_timeout_s=5")
    began = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    try:
        while not (folder / ".ranks" / "stacks_rank_0.txt").exists():
            assert time.monotonic() - began < WAIT_S
            time.sleep(0.2)
    finally:
        os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=WAIT_S)[0]
    assert process.returncode != 0
    assert f"watchdog: rank 1 (pid {pids[1]} on" in output, output[-3000:]
    stacks = (folder / ".ranks" / "stacks_rank_0.txt").read_text()
    assert "trainer.py" in stacks and "watchdog.py" in stacks


# -- refusals: one rank, no launcher, no process group ----------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_yaml) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = train_alone(["--config", str(tiny_yaml), "--output_dir", str(folder), "training.max_steps=2"])
    assert done.returncode == 0, done.stderr
    return folder


def test_plain_python_is_one_rank(finished):
    assert json.loads((finished / "run.json").read_text())["world_size"] == 1
    assert (finished / "step_2" / "manifest.json").exists()


@pytest.mark.parametrize(
    "code, words, argv",
    [
        (2, "unknown key 'training.max_stepz'", ["training.max_stepz=1"]),
        (2, "not a multiple of training.micro_batch_size=3", ["training.micro_batch_size=3"]),
        (2, "stray first step", ["training.precision=bf16", "--deepspeed_config", "ds_configs/zero0.json"]),
        (2, "zero9.json: No such file", ["--deepspeed_config", "ds_configs/zero9.json"]),
        (2, "already holds a run; continue it with --resume_from auto", ["@finished"]),
        (2, "made with another model.d_head, model.d_model", ["@finished", "--resume_from", "latest", "model.d_model=64"]),
        (2, "training.learning_rate differ", ["@finished", "--resume_from", "latest", "training.learning_rate=1e-2"]),
        (3, "meant by 'step_77', does not exist", ["@finished", "--resume_from", "step_77"]),
        (3, "choose one of step_2", ["@finished", "--resume_from", "step_77"]),
        (3, "is not a prepared dataset", ["data.data_dir=nowhere"]),
        (3, "has 64 entries, more than model.vocab_size=32", ["model.vocab_size=32"]),
        (3, "latest does not exist", ["--resume_from", "latest"]),
        (3, "made with ZeRO 1 or 2 on 1 rank(s), this is ZeRO 3 on 1 rank(s)", ["@finished", "--resume_from", "latest", "--deepspeed_config", "ds_configs/zero3.json"]),
        (3, "nowhere/config.json: cannot be read", ["training.init_from=nowhere"]),
        (2, "its weights do not fit: model.d_ffn (64 there, 32 here)", ["model.d_ffn=32", "training.init_from=@finished/step_2"]),
        (3, "model.safetensors: its sha256 is not that of the manifest", ["@damaged", "--resume_from", "auto"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_process_group(tmp_path, tiny_yaml, finished, code, words, argv):
    folder = tmp_path / "new"
    if argv[0] in ("@finished", "@damaged"):
        folder = tmp_path / "copy"
        shutil.copytree(finished, folder)
        if argv[0] == "@damaged":
            path = folder / "step_2" / "model.safetensors"
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 16
            path.write_bytes(raw)
            argv = ["@damaged", "--resume_from", "step_2"]
        argv = argv[1:]
    argv = [word.replace("@finished", str(finished)) for word in argv]
    before = sorted(folder.rglob("*")) if folder.exists() else []
    done = train_alone(["--config", str(tiny_yaml), "--output_dir", str(folder), *argv])
    assert done.returncode == code, done.stderr
    assert words in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert (sorted(folder.rglob("*")) if folder.exists() else []) == before


def test_a_refusal_under_a_launcher_is_said_once_with_its_exit_code(tmp_path, tiny_yaml):
    process = start_training(2, ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "x"), "training.seeed=1"])
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert (
        output.count("error: override 'training.seeed=1': unknown key 'training.seeed'; did you mean training.seed")
        == 1
    )


def test_other_text_is_noticed_on_resume(tmp_path, tiny_yaml, finished):
    shutil.copytree(finished, tmp_path / "run")
    write_dataset(tmp_path / "other", [[1, 2, 3]] * 400, vocab_size=64, held_out=[[1, 2]])
    argv = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run"), "--resume_from", "latest"]
    shutil.copytree(data_of(tiny_yaml), tmp_path / "kept")
    try:
        shutil.rmtree(data_of(tiny_yaml))
        shutil.copytree(tmp_path / "other", data_of(tiny_yaml))
        done = train_alone([*argv, "training.max_steps=3"])
    finally:
        shutil.rmtree(data_of(tiny_yaml))
        shutil.copytree(tmp_path / "kept", data_of(tiny_yaml))
    assert done.returncode == 3 and "step_2 was trained on other text" in done.stderr, done.stderr


def data_of(tiny_yaml: Path) -> Path:
    return Path(yaml.safe_load(tiny_yaml.read_text())["data"]["data_dir"])


def test_auto_starts_afresh_and_then_continues_and_passes_over_what_is_torn(tmp_path, tiny_yaml):
    argv = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run"), "--resume_from", "auto"]
    done = train_alone([*argv, "training.stop_at_step=1"])
    assert done.returncode == 0 and "starting afresh" in done.stdout
    torn = tmp_path / "run" / "step_4"
    torn.mkdir()
    (torn / "mp_rank_00_model_states.pt").write_bytes(b"half")
    done = train_alone([*argv, "training.stop_at_step=2"])
    assert done.returncode == 0, done.stderr
    assert "passed over:" in done.stdout and "step_4: manifest.json: missing: the save was interrupted" in done.stdout
    assert "resumed step_1: continuing at step 2 of 2" in done.stdout
    assert not torn.exists() and (tmp_path / "run" / "segments" / "step_4.0").exists()


def test_help_lists_every_key():
    done = train_alone(["--help"])
    assert done.returncode == 0
    assert "--resume_from" in done.stdout and "indexer_loss_weight (float, default 0.1)" in done.stdout


def test_wandb_offline_without_a_key_and_never_fatal(tmp_path, tiny_yaml, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    import launching

    environment = {k: v for k, v in launching.rank_environment().items() if k != "WANDB_MODE"}
    monkeypatch.setattr(launching, "rank_environment", lambda: environment)
    argv = ["--config", str(tiny_yaml), "training.max_steps=2", "logging.wandb=true"]
    done = train_alone([*argv, "--output_dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert "no key found, so this run is tracked offline" in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb").write_text("a file where W&B wants a folder")
    done = train_alone([*argv, "--output_dir", str(blocked)])
    assert done.returncode == 0, done.stderr
    assert (blocked / "step_2").exists()
