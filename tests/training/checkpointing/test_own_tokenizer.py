"""A checkpoint alone generates, with its own tokenizer and no other, and every reader of weights sees a changed byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import documents
from support.tiny_dataset import word_tokenizer, write_dataset
from tokenizers import Tokenizer

from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.generation import load_model
from gsa.weights import WEIGHTS, load_weights
from training import generate, inspect_indexer, verify
from training.config.command import run_command
from training.data.dataset import DataError
from training.loop.preflight import prepare
from training.train import parse


@pytest.fixture
def alone(a_run, tmp_path) -> Path:
    """A copy of one checkpoint, in a folder without a run."""
    return shutil.copytree(a_run / "step_6", tmp_path / "elsewhere" / "step_6")


def continued(step_dir: Path, *more: str) -> int:
    return run_command(generate.main, [str(step_dir), "--prompt", "w1 w2", "--max_new_tokens", "4", *more])


def older(step_dir: Path) -> Path:
    """Makes a checkpoint one of an earlier version, which carries no tokenizer; its run state still names one."""
    (step_dir / "tokenizer.json").unlink()
    manifest.seal(step_dir)
    return step_dir


def test_a_checkpoint_alone_generates_from_any_working_directory(alone, corpus, tmp_path, monkeypatch, capsys):
    state = read_run_state(alone)
    assert (alone / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    assert state.tokenizer_sha256 == json.loads((corpus / "manifest.json").read_text())["tokenizer_sha256"]
    assert (state.tokenizer_entries, state.eod_id) == (64, 63)
    monkeypatch.chdir(alone)
    assert continued(Path(".")) == 0
    here = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    renamed = alone.rename(tmp_path / "my model")
    assert continued(renamed) == 0
    assert capsys.readouterr().out == here and here.startswith("w1 w2")


def test_another_tokenizer_is_refused_and_the_same_one_in_another_spelling_is_not(alone, tmp_path, capsys):
    small = tmp_path / "small.json"
    small.write_text(word_tokenizer(20).to_str())
    assert continued(alone, "--tokenizer", str(small)) == 3
    assert f"--tokenizer {small} has 20 entries and is not the tokenizer of {alone}" in capsys.readouterr().err
    same = Tokenizer.from_file(str(alone / "tokenizer.json"))
    same.enable_truncation(7)
    same.save(str(tmp_path / "same.json"), pretty=True)
    assert continued(alone, "--tokenizer", str(tmp_path / "same.json")) == 0
    for path in (tmp_path / "nowhere.json", Path("/dev/zero")):
        assert continued(alone, "--tokenizer", str(path)) == 3
        assert f"no tokenizer at {path}" in capsys.readouterr().err


def test_an_older_checkpoint_uses_the_tokenizer_of_its_text_as_long_as_it_is_its_text(alone, corpus, capsys):
    assert continued(older(alone)) == 0
    assert "warning" not in capsys.readouterr().err
    moved = corpus.rename(corpus.with_name("moved"))
    try:
        assert continued(alone) == 3
        assert "carries no tokenizer" in (said := capsys.readouterr().err) and "--tokenizer" in said
        write_dataset(corpus, documents(20, seed=9), vocab_size=64, held_out=documents(5, seed=8))
        assert continued(alone) == 3
        assert "no longer holds the text that it was trained on" in capsys.readouterr().err
        assert continued(alone, "--tokenizer", str(moved / "tokenizer.json")) == 0
    finally:
        shutil.rmtree(corpus, ignore_errors=True)
        moved.rename(corpus)


def test_a_changed_tokenizer_of_a_checkpoint_is_refused(alone, capsys):
    path = alone / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1":1', '"w1":2').replace('"w2":2', '"w2":1'))
    assert continued(alone) == 3
    assert "tokenizer.json: its sha256 is not that of the manifest" in capsys.readouterr().err
    manifest.seal(alone)
    assert continued(alone) == 3
    assert "is not the tokenizer of" in capsys.readouterr().err
    assert run_command(verify.main, [str(alone)]) == 3
    assert "is not the tokenizer that the run state names" in capsys.readouterr().out


def test_text_of_another_tokenizer_is_refused(alone, tmp_path, tiny_yaml, capsys):
    """The same number of ids with other meanings: nothing but the hash notices."""
    other = tmp_path / "other"
    write_dataset(other, documents(60, seed=1), vocab_size=64, held_out=documents(5, seed=2))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w1":1', '"w1":2').replace('"w2":2', '"w2":1'))
    described = json.loads((other / "manifest.json").read_text())
    described["tokenizer_sha256"] = manifest.sha256_of(other / "tokenizer.json")
    (other / "manifest.json").write_text(json.dumps(described | {"fingerprint": "other"}))
    assert run_command(inspect_indexer.main, [str(alone), "--data", str(other), "--windows", "1"]) == 3
    assert "was trained with another tokenizer (64 entries" in capsys.readouterr().err
    common = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "new"), f"data.data_dir={other}"]
    init = [*common, f"training.init_from={alone}"]
    with pytest.raises(DataError, match=r"was trained with another tokenizer .* --allow_config_change"):
        prepare(parse(init))
    assert prepare(parse([*init, "--allow_config_change"])).start is None
    capsys.readouterr()
    prepare(parse([*common, "--resume_from", str(alone), "training.max_steps=8", "--allow_config_change"]))
    assert "so that the same ids mean other text" in capsys.readouterr().out


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_every_reader_of_weights_sees_a_changed_byte(alone, tiny_yaml, tmp_path, capsys, name):
    path = alone / name
    raw = bytearray(path.read_bytes())
    at = len(raw) - 20 if name == WEIGHTS else raw.index(b'"seed": 7') + 8
    raw[at] ^= 1
    path.write_bytes(raw)
    says = f"{name}: its sha256 is not that of the manifest"
    for read in (load_weights, load_model):
        with pytest.raises(CheckpointError, match=says):
            read(alone)
    for command in (generate.main, inspect_indexer.main, verify.main):
        assert run_command(command, [str(alone), *(["--prompt", "w1"] if command is generate.main else [])]) == 3
        printed = capsys.readouterr()
        assert says in printed.err + printed.out
    argv = ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "new"), f"training.init_from={alone}"]
    with pytest.raises(CheckpointError, match=says):
        prepare(parse(argv))


def test_a_checkpoint_whose_save_was_interrupted_gives_no_weights(alone):
    (alone / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the save was interrupted"):
        load_weights(alone)
    for path in alone.glob("*_states.pt"):
        path.unlink()
    config, weights = load_weights(alone)  # weights that were exported
    assert config["vocab_size"] == 64 and all(np.isfinite(w.float().numpy()).all() for w in weights.values())


def test_a_checkpoint_of_text_without_a_tokenizer_needs_one(alone, corpus, tmp_path, capsys):
    step, path = older(alone), corpus / "tokenizer.json"
    hidden = path.rename(tmp_path / "tokenizer.json")
    try:
        assert continued(step) == 3
        assert f"carries no tokenizer, and {corpus} has none" in capsys.readouterr().err
        assert continued(step, "--tokenizer", str(hidden)) == 0
    finally:
        hidden.rename(path)
