"""Every file directly in training/ is a command with a summary, a --help and its own name in it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.launching import ROOT, clean_environment

from training.__main__ import commands, main

NAMES = sorted(path.stem for path in (ROOT / "training").glob("*.py") if not path.stem.startswith("__"))


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
    )


def test_the_list_has_every_command_with_one_line(capsys):
    assert main([]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == NAMES and all(10 < len(summary) < 120 for _, summary in lines)
    assert sorted(commands()) == NAMES and len(NAMES) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_each_command_answers_help_with_its_name(name):
    done = python("-m", f"training.{name}", "--help")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    called = "training/train.py" if name == "train" else f"python -m training.{name}"
    assert done.stdout.startswith(f"usage: {called}"), done.stdout[:200]
    assert "xit code" in done.stdout, "which exit codes?"


def test_a_command_runs_by_its_name_and_an_unknown_one_is_refused():
    done = python("-m", "training", "verify", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m training.verify")
    done = python("-m", "training", "veryfy")
    assert done.returncode == 2 and "no command 'veryfy'" in done.stderr
