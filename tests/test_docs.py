"""README.md and docs/ name commands, flags, configuration keys and files that exist."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
from support.launching import ROOT, rank_environment

from training.__main__ import commands
from training.config.exit_codes import ExitCode
from training.config.schema import all_keys

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
)
LEGACY_KEY = "model.gsa"  # the section of legacy yaml files that docs/checkpoints.md names
COMMAND_LINES = sorted(
    {
        line.strip()
        for page in PAGES
        for line in re.findall(r"python -m training\.\w+[^`#\n]*", (ROOT / page).read_text())
    }
)


@functools.cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"training.{command}", "--help"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_of_exit_codes_is_complete():
    table = re.findall(r"^\| (\d) \| `(\w+)` \|", (ROOT / "docs" / "running.md").read_text(), re.M)
    assert [(int(number), name) for number, name in table] == [(code.value, code.name) for code in ExitCode]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text())
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_configuration_keys_exist(page):
    """`training.x` in backticks is a key or a command; `model.x`, `data.x` and `logging.x` are keys or file names."""
    named = re.findall(r"`((?:model|training|data|logging)\.\w+)[`=]", (ROOT / page).read_text())
    known = {*all_keys(), *(f"training.{command}" for command in commands()), "model.safetensors", LEGACY_KEY}
    assert set(named) <= known


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_have_the_flags_that_are_shown(line):
    command = re.match(r"python -m training\.(\w+)", line)[1]
    assert command in commands()
    flags = set(re.findall(r"--[\w-]+", line))
    if command == "launch":  # the launcher's flags, and those of training/train.py
        assert flags <= {"--num_gpus", *re.findall(r"--[\w-]+", help_of("train"))}
        return
    if re.search(r"training\.(checkpoints|tracking) \w+ ", line):  # the flags of a subcommand are in its own help
        return
    assert all(flag in help_of(command) for flag in flags)
