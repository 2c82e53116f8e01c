"""README's commands do what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import ROOT, clean_environment, rank_environment

from training import prepare_data
from training.config import load_config
from training.train import parse

COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_readme_has_its_two_commands():
    assert COMMANDS[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    elif "training/train.py" in words:
        args = parse(words[words.index("training/train.py") + 1 :])
        load_config(ROOT / args.config, args.overrides)
        assert words[0] in ("deepspeed", "python", "torchrun")
    else:
        assert words[:2] == ["python", "-m"]
        done = subprocess.run(
            [sys.executable, "-m", words[2], "--help"], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0
        options = [word for word in words[3:] if word.startswith("--")]
        assert all(option in done.stdout for option in options), done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, list[subprocess.CompletedProcess]]:
    """`make quickstart` in a shortened form, twice: little text, few steps, the same code and launcher."""
    base = tmp_path_factory.mktemp("quickstart")
    text = [str(ROOT / "docs"), str(ROOT / "README.md"), str(ROOT / "ds_configs")]
    assert prepare_data.main([*text, "--out", str(base / "data"), "--vocab_size", "600", "--workers", "1"]) == 0
    command = [
        sys.executable,
        "-m",
        "training.quickstart",
        "--output_dir",
        str(base / "run"),
        "--stop_at",
        "10",
        f"data.data_dir={base / 'data'}",
        "training.max_steps=20",
        "training.max_seq_len=64",
        "model.vocab_size=600",
        "training.indexer_warmup_steps=5",
        "training.warmup_steps=2",
        "training.eval_windows=16",
        "model.n_layers=2",
    ]
    runs = [
        subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=900)
        for _ in range(2)
    ]
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    return base, runs


def test_quickstart_trains_stops_resumes_evaluates_and_generates(quickstart):
    base, (first, _) = quickstart
    for words in (
        "deepspeed",
        "ds_configs/zero2.json",
        "saved step_10",
        "resumed step_10: continuing at step 11 of 20",
        "saved step_20",
        "bits per byte; a unigram model:",
        "training loss, nats per token, 20 steps",
        "def main(",
        "where everything lies",
    ):
        assert words in first.stdout, first.stdout
    score = re.search(r"held-out text: ([\d.]+) bits per byte; a unigram model: ([\d.]+)", first.stdout)
    assert 0 < float(score[1]) < 12 and 0 < float(score[2]) < 8


def test_a_second_quickstart_repeats_nothing(quickstart):
    base, (_, second) = quickstart
    assert "is finished already" in second.stdout and "resumed" not in second.stdout
    assert "bits per byte" in second.stdout and "def main(" in second.stdout
