"""A folder from a stranger can do nothing: what is forged is refused with one error, at once, and nothing is obeyed."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launching import ROOT

from gsa import yaml_text
from gsa.checkpoint import manifest, safe_load
from gsa.checkpoint.full_state import read_full_state, read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import CLIENT_KEY, RunState, read_config_json
from gsa.generation import load_model
from gsa.units import printable
from gsa.weights import load_weights
from training import train
from training.config import ConfigError, load_config
from training.config.command import run_command
from training.data import DataError, PackedTokens
from training.record.metrics_log import read_rows
from training.record.reader import NoRunError
from training.record.reader import read as read_record
from training.record.run_folder import RunFolder

MODEL_STATES = "mp_rank_00_model_states.pt"


@pytest.fixture
def forged(a_run, tmp_path):
    """A copy of a run, and a function that changes its step_6 and seals it again, as a stranger can."""
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    step = run / "step_6"

    def forge(change: Callable[[Path], None]) -> Path:
        (step / "manifest.json").unlink()
        change(step)
        manifest.seal(step)
        return step

    return forge


def state(**fields) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        for path in step.glob("*model_states.pt"):
            content = torch.load(path, weights_only=False)
            content[CLIENT_KEY].update(fields)
            torch.save(content, path)

    return change


def resume(step: Path, tiny_yaml: Path, *argv: str) -> int:
    out = step.parent.parent / "out"
    return train.main(
        [
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(out),
            "--resume_from",
            str(step),
            "--allow_config_change",
            *argv,
        ]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"decided": {"data.data_dir": "/somewhere/else"}},
        {"decided": {"training.max_steps": 10**9, "logging.wandb": True, "logging.project": "stolen"}},
        {"decided": {"x.y": 1}},
        {"decided": {"x": 1}},
        {"decided": {"model.tie_embeddings": {"a": 1}}},
        {"tracking_id": "../../../tmp/x\x1b[31m"},
        {"skipped": [["a", None]]},
        {"skipped": [[0, 10**30]]},
        {"samples_consumed": 10**40},
        {"samples_consumed": -(10**6)},
        {"tokens_seen": -5},
        {"step": 10**30},
        {"epoch": float("nan")},
        {"world_size": 0},
        {"zero_stage": 9},
        {"config": {}},
        {"config": {"model": 5, "training": [], "data": None, "logging": "x"}},
        {"created": "\x1b]0;title\x07"},
    ],
    ids=str,
)
def test_a_forged_run_state_is_refused(forged, tiny_yaml, capsys, fields):
    step = forged(state(**fields))
    assert resume(step, tiny_yaml) in (2, 3)
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1 and "Traceback" not in printed.err
    assert not any(c in printed.err + printed.out for c in "\x1b\x07")
    assert not (step.parent.parent / "out").exists()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("thing", [pipe, endless])
@pytest.mark.parametrize("name", ["step_6/manifest.json", "latest", "metrics.jsonl", "run.json", "config.yaml"])
def test_pipes_and_devices_in_place_of_files_hang_nothing(a_run, tmp_path, tiny_yaml, thing, name):
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    thing(run / name)
    argv = ["--config", str(tiny_yaml), "--output_dir", str(run), "--resume_from", "latest", "training.max_steps=6"]
    if name in ("latest", "metrics.jsonl", "step_6/manifest.json"):
        assert train.main(argv) == 3
    from training import checkpoints, doctor, report

    for tool, extra in ((checkpoints, ["list"]), (report, []), (doctor, [])):
        assert run_command(tool.main, [*extra, str(run)]) in (0, 1, 2, 3)


def test_compressed_parts_of_a_checkpoint_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for part in good.infolist():
            bomb.writestr(part.filename, good.read(part), zipfile.ZIP_DEFLATED)
    assert safe_load.load(tmp_path / "good.pt")["a"].numel() == 1000
    with pytest.raises(CheckpointError, match="its parts are compressed"):
        safe_load.load(tmp_path / "bomb.pt")


@pytest.mark.parametrize("change", [{"n_layers": 10**9}, {"d_ffn": 10**12}, {"vocab_size": 10**12}])
def test_a_model_that_the_weights_do_not_hold_is_not_built(forged, change):
    def grow(step: Path) -> None:
        config = json.loads((step / "config.json").read_text())
        config["model"].update(change)
        (step / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"config.json describes .* parameters, model.safetensors holds"):
        load_model(forged(grow))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 20_000, "a: " + "9" * 10_000 + "\n"], ids=range(4))
def test_yaml_that_grows_without_bound_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml", [])


def test_a_few_aliases_are_fine():
    assert yaml_text.load("a: &a {x: 1}\nb: *a\n") == {"a": {"x": 1}, "b": {"x": 1}}


def test_control_characters_are_shown_and_not_obeyed(forged, tmp_path, capsys):
    step = forged(lambda step: None)
    (step / "evil\x1b]0;title\x07\nerror: all is well").write_text("x")
    from training import verify

    assert run_command(verify.main, [str(step)]) == 3
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and r"\x1b]0;title\x07" in printed.out + printed.err
    assert printable("a\tb\n\x1b\x07\u202e") == "a\tb\n\\x1b\\x07\\u202e"


# -- whatever the bytes: the declared errors, and nothing else --------------------------------------------------

FIXTURE = ROOT / "tests" / "fixtures" / "run_625a451"


def readers(run: Path) -> dict[str, Callable[[], object]]:
    step = max(run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    shard = next(step.glob("*optim_states.pt"))
    return {
        "manifest.json": lambda: manifest.verify(step),
        "config.json": lambda: read_config_json(step),
        "model.safetensors": lambda: load_weights(step, verified=True),
        shard.name: lambda: read_full_state(step),
        next(step.glob("*model_states.pt")).name: lambda: read_run_state(step),
        "latest": lambda: manifest.latest_tag(run),
        "run.json": lambda: RunFolder(run, warn=lambda text: None).read_run(),
        "metrics.jsonl": lambda: read_rows(run / "metrics.jsonl"),
        "config.yaml": lambda: load_config(run / "config.yaml", []),
        "": lambda: read_record(run),
    }


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Path:
    """A small real run to change bytes of."""
    base = tmp_path_factory.mktemp("strange")
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(base, filter="data")
    return next(path for path in sorted(base.iterdir()) if (path / "run.json").exists())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_changed_bytes_raise_the_declared_errors_only(strange, data):
    found = readers(strange)
    name = data.draw(st.sampled_from(sorted(filter(None, found))))
    path = next(strange.rglob(name)) if not (strange / name).exists() else strange / name
    step = max(strange.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    path = step / name if (step / name).exists() else path
    before = path.read_bytes()
    changed = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at : at + data.draw(st.integers(1, 200))]
        elif kind == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            changed[at : at + 8] = bytes(8)
    path.write_bytes(changed)
    try:
        for read in (found[name], found[""]):
            try:
                read()
            except (CheckpointError, ConfigError, NoRunError):
                pass
    finally:
        path.write_bytes(before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_run_state_is_read_or_refused(data):
    good = RunState(
        step=3,
        epoch=0.5,
        samples_consumed=24,
        tokens_seen=768,
        config={"model": {}},
        data_fingerprint="f",
        tracking_id=None,
        stage="sparse",
        versions={"project": "1"},
        world_size=2,
        zero_stage=2,
        created="now",
    ).to_dict()
    for name in data.draw(st.lists(st.sampled_from(sorted(good)), max_size=3)):
        good[name] = data.draw(JSON)
    try:
        RunState.from_dict(good)
    except CheckpointError:
        pass


def test_a_pickle_in_place_of_a_checkpoint_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer)
    (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        safe_load.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def strange_text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strange_text") / "data"
    shutil.copytree(FIXTURE / "data", folder)
    return folder


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_dataset_with_changed_bytes_is_refused_or_gives_batches(strange_text, data):
    files = sorted(path for path in strange_text.rglob("*") if path.is_file() and "verified" not in path.name)
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    changed = bytearray(before)
    at = data.draw(st.integers(0, max(0, len(changed) - 1)))
    if data.draw(st.booleans()):
        changed[at : at + 1] = data.draw(st.binary(max_size=12))
    else:
        del changed[at:]
    path.write_bytes(changed)
    try:
        for split in ("train", "held_out"):
            text = PackedTokens({str(strange_text): 1.0}, split=split, max_seq_len=32, seed=1)
            text.require_true_token_bytes()
            text.batch(np.arange(2))
    except DataError:
        pass
    finally:
        path.write_bytes(before)
