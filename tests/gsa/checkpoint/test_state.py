"""The run state accepts plain values only and names the key of any other; it refuses what it cannot read."""

from __future__ import annotations

import dataclasses
import enum
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from gsa import weights
from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import CLIENT_KEY, VERSION, RunState, read_config_json

ROOT = Path(__file__).resolve().parents[3]

STATE = RunState(
    step=300,
    epoch=1.25,
    samples_consumed=4800,
    tokens_seen=1_200_000,
    config={"model": {"n_layers": 4, "rope": 1e4}, "data": {"mixture": None, "dirs": ["a", "b"]}, "wandb": False},
    data_fingerprint="f" * 64,
    tracking_id=None,
    stage="sparse",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8", "project": "0.1.0"},
    world_size=2,
    zero_stage=3,
    created="2026-01-31T12:00:00+00:00",
)


class Text(str):
    pass


class Choice(str, enum.Enum):  # noqa: UP042
    A = "a"


def test_a_state_survives_the_file_it_is_saved_in():
    buffer = io.BytesIO()
    torch.save({CLIENT_KEY: STATE.to_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)[CLIENT_KEY]
    assert RunState.from_dict(loaded) == STATE
    assert RunState.from_dict(json.loads(json.dumps(loaded))) == STATE
    tracked = dataclasses.replace(STATE, tracking_id="abc", epoch=0)
    assert RunState.from_dict(tracked.to_dict()) == tracked


def test_every_version_of_the_run_state_is_read():
    """These are the dicts in existing files: every later reader must read them."""
    first = {
        "version": 1,
        "step": 300,
        "epoch": 1.25,
        "samples_consumed": 4800,
        "tokens_seen": 1200000,
        "config": STATE.config,
        "data_fingerprint": "f" * 64,
        "tracking_id": None,
        "stage": "sparse",
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "project": "0.1.0"},
        "world_size": 2,
        "zero_stage": 3,
        "created": "2026-01-31T12:00:00+00:00",
    }
    second = {**first, "version": 2, "epoch_offset": 0.0, "indexer_start": 0, "decided": {}}
    third = {**second, "version": 3, "skipped": []}
    fourth = {**third, "version": 4, "tokenizer_sha256": None, "tokenizer_entries": None, "eod_id": None}
    fifth = {**fourth, "version": 5, "earlier_texts": []}
    assert STATE.to_dict() == fifth
    assert all(RunState.from_dict(state) == STATE for state in (first, second, third, fourth, fifth))


@pytest.mark.parametrize("where", ["gsa/checkpoint/__init__.py", "docs/checkpoints.md"])
def test_the_tables_of_formats_name_the_current_versions(where):
    text = (ROOT / where).read_text().replace("`", "")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    now = {cells[1].split(",")[0].strip(): cells[3].strip() for cells in rows if len(cells) == 6}
    assert now["run state"] == str(VERSION)
    assert now["manifest.json"] == str(manifest.FORMAT) and now["config.json with model.safetensors"] == str(
        weights.FORMAT
    )
    deepspeed = next(
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("deepspeed")
    )
    assert now["*_states.pt"] in deepspeed


def test_the_saved_dict_does_not_change_with_the_configuration():
    config = {"model": {"n_layers": 4}, "list": [1]}
    saved = dataclasses.replace(STATE, config=config).to_dict()
    config["model"]["n_layers"] = 5
    config["list"].append(2)
    assert saved["config"] == {"model": {"n_layers": 4}, "list": [1]}


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (OmegaConf.create({"b": 1}), "omegaconf.dictconfig.DictConfig"),
        (OmegaConf.create([1]), "omegaconf.listconfig.ListConfig"),
        (np.float64(1.0), "numpy.float64"),  # a float, and yet not a plain one
        (np.int64(1), "numpy.int64"),
        (np.zeros(1), "numpy.ndarray"),
        (torch.zeros(()), "torch.Tensor"),
        (Text("a"), "Text"),
        (Choice.A, "Choice"),
        ((1, 2), "builtins.tuple"),
        ({1}, "builtins.set"),
        (b"a", "builtins.bytes"),
        (float("nan"), "builtins.float"),
        (float("inf"), "builtins.float"),
        (np, "builtins.module"),
    ],
)
def test_a_value_that_is_not_plain_is_refused_with_its_key(value, type_name):
    state = dataclasses.replace(STATE, config={"training": {"steps": [{"a": 1}, {"a": value}]}})
    with pytest.raises(TypeError, match=rf"gsa_run\.config\.training\.steps\[1\]\.a is .*{type_name}; .*convert it"):
        state.to_dict()


def test_a_key_that_is_not_text_and_a_field_of_another_type_are_refused_when_saving():
    with pytest.raises(TypeError, match=r"gsa_run\.config has the key 1 of type builtins\.int"):
        dataclasses.replace(STATE, config={1: 2}).to_dict()
    with pytest.raises(TypeError, match=r"gsa_run\.step='3' is not int"):
        dataclasses.replace(STATE, step="3").to_dict()
    with pytest.raises(TypeError, match=r"gsa_run\.samples_consumed is .* of type numpy\.int64"):
        dataclasses.replace(STATE, samples_consumed=np.int64(3)).to_dict()


def test_the_refusal_of_a_newer_state_names_the_project_version_that_reads_it():
    newer = {"version": VERSION + 1, "versions": {"project": "0.7.0"}, "position": {}}
    with pytest.raises(CheckpointError, match=rf"version {VERSION + 1}, this project reads up to {VERSION}: .* 0.7.0"):
        RunState.from_dict(newer)
    with pytest.raises(CheckpointError, match="update the project to the version that wrote it"):
        RunState.from_dict({"version": VERSION + 1, "versions": "?"})


@pytest.mark.parametrize("data", [None, [], {}, {"step": 1}, {"version": 0}, {"version": "1"}, {"version": True}])
def test_a_value_that_is_no_run_state_is_refused(data):
    with pytest.raises(CheckpointError, match="no version.*--resume_from"):
        RunState.from_dict(data)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunState)])
def test_every_missing_or_mistyped_field_is_named(name):
    data = STATE.to_dict()
    with pytest.raises(CheckpointError, match=rf"has {name}=b'', which is not "):
        RunState.from_dict({**data, name: b""})
    del data[name]
    with pytest.raises(CheckpointError, match=rf"lacks, or does not know, {name}"):
        RunState.from_dict(data)


@pytest.mark.parametrize(("name", "value"), [("stage", "both"), ("step", True), ("epoch", "1")])
def test_impossible_values_are_refused(name, value):
    with pytest.raises(CheckpointError, match=f"has {name}="):
        RunState.from_dict({**STATE.to_dict(), name: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(CheckpointError, match="does not know, extra"):
        RunState.from_dict({**STATE.to_dict(), "extra": 1})


def test_the_configuration_is_readable_beside_the_shards(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, **STATE.config}))
    assert read_config_json(tmp_path) == STATE.config


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[]", b"[" * 200_000])
def test_a_damaged_configuration_is_refused_by_name(tmp_path, content):
    with pytest.raises(CheckpointError, match="config.json: cannot be read: No such file"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json: (not JSON|holds no JSON object)"):
        read_config_json(tmp_path)
