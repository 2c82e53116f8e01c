"""A child process of a test gets an environment that does not depend on what ran before it in the same process."""

from __future__ import annotations

import ast
import os

import pytest
from support import launching
from support.launching import ROOT, clean_environment, rank_environment

LEFTOVERS = [
    "WANDB_SERVICE",
    "WANDB_API_KEY",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_SIZE",
    "TORCHELASTIC_RUN_ID",
    "DS_ACCELERATOR",
    "TRITON_INTERPRET",
]

STARTS = {"run", "Popen", "call", "check_call", "check_output"}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_not_passed_on_even_from_the_shell(name, monkeypatch):
    monkeypatch.setitem(launching._AT_START, name, "3-5-unix-/gone")
    assert name not in clean_environment()
    assert rank_environment().get(name) in (None, "cpu")


def test_what_a_test_sets_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SET_BY_A_TEST", "1")
    monkeypatch.delenv("PATH")
    assert "SET_BY_A_TEST" not in clean_environment() and "PATH" in clean_environment()


def test_every_child_is_given_an_environment():
    """subprocess passes os.environ on by itself: each call in tests/ names another one."""
    without = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name == "compile_triton_ahead.py":  # a child itself, whose environment is clean
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"subprocess.{name}" for name in STARTS}:
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if "env" not in given or "os.environ" in given["env"]:
                    without.append(f"{os.path.relpath(path, ROOT)}:{node.lineno}")
    assert not without, f"give these calls env=clean_environment() or rank_environment(): {without}"
