"""The command training.generate refuses wrong input."""

from __future__ import annotations

import pytest
import torch

from training.config.command import run_command
from training.generate import main


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--temperature", "-1", "--temperature -1.0 must not be negative"),
        ("--top_k", "-2", "--top_k -2 must not be negative"),
        ("--top_p", "0", "--top_p 0.0 must be above 0"),
        ("--top_p", "1.5", "--top_p 1.5 must be above 0 and at most 1"),
        ("--max_new_tokens", "0", "--max_new_tokens 0 must be at least 1"),
        ("--prompt", "", "--prompt is empty"),
        ("--device", "cuda", "torch sees no GPU"),
    ],
)
def test_an_impossible_option_is_refused_by_name(tmp_path, capsys, monkeypatch, option, value, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(main, [str(tmp_path), "--prompt", "x", f"{option}={value}"]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert run_command(main, [str(tmp_path), "--prompt", "x"]) == 3
    assert str(tmp_path) in capsys.readouterr().err
