"""One object reports a run: rank 0's writes and prints, the other ranks' does nothing and looks the same."""

from __future__ import annotations

import inspect

import pytest

from training.observe.recorder import Recorder, SilentRecorder, open_recorder


def public_methods(recorder: type) -> dict[str, object]:
    members = inspect.getmembers(recorder, inspect.isfunction)
    return {name: function for name, function in members if not name.startswith("_")}


def test_both_recorders_have_the_same_methods_with_the_same_parameters():
    silent, real = public_methods(SilentRecorder), public_methods(Recorder)
    assert silent.keys() == real.keys() and len(real) > 8
    for name, function in real.items():
        assert list(inspect.signature(function).parameters) == list(inspect.signature(silent[name]).parameters), name
        assert function is not silent[name], f"Recorder.{name} does nothing"


@pytest.mark.parametrize("name", sorted(public_methods(SilentRecorder)))
def test_the_silent_one_writes_and_prints_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(public_methods(SilentRecorder)[name]).parameters.values()
    given = [p for p in parameters if p.name != "self" and p.default is p.empty]
    positional = ["x" for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name: "x" for p in given if p.kind is p.KEYWORD_ONLY}
    getattr(SilentRecorder(), name)(*positional, **named)
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_only_rank_0_records():
    assert type(open_recorder(False, None, None, None, log_level="info")) is SilentRecorder
