"""Loading a checkpoint executes nothing in it, and every bad file raises a CheckpointError that names it."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from gsa.checkpoint import manifest, safe_load
from gsa.checkpoint.manifest import CheckpointError

PLAIN = {
    "weight": torch.arange(6.0).view(2, 3),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "order": collections.OrderedDict(a=1),
    "values": [1, 2.5, True, None, "text", (1, 2)],
}


class Call:
    """Pickles as a call of `function`: unpickling it naively makes the call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Innocent:
    pass


def touch_by_os(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


def touch_by_eval(marker: Path) -> Call:
    return Call(eval, f"open({str(marker)!r}, 'w').close()")


def touch_by_open(marker: Path) -> Call:
    return Call(open, str(marker), "w")


def touch_nested(marker: Path) -> Call:
    # a pickle within a pickle, for the loader of torch that executes what it finds
    return Call(torch.storage._load_from_bytes, saved(touch_by_os(marker)))


def saved(value: object, **how) -> bytes:
    buffer = io.BytesIO()
    torch.save({**PLAIN, "last": value}, buffer, **how)
    return buffer.getvalue()


def refusal(path: Path, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        safe_load.load(path, **how)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "weights_only" not in message and "torch.load" not in message and "\n" not in message
    return message


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_and_plain_values_come_back(tmp_path, mmap):
    path = tmp_path / "good.pt"
    torch.save(PLAIN, path)
    loaded = safe_load.load(path, mmap=mmap)
    assert (str(path) in Path("/proc/self/maps").read_text()) == mmap
    for name in ("weight", "bf16"):
        assert loaded[name].dtype == PLAIN[name].dtype and torch.equal(loaded[name], PLAIN[name])
    assert loaded["order"] == PLAIN["order"] and loaded["values"] == PLAIN["values"]


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (touch_by_os, "posix.system"),
        (touch_by_eval, "builtins.eval"),
        (touch_by_open, "io.open"),
        (touch_nested, "torch.storage._load_from_bytes"),
    ],
)
def test_a_malicious_pickle_is_refused_by_name_also_resealed(tmp_path, monkeypatch, attack, name, environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    marker, step_dir = tmp_path / "marker", tmp_path / "step_1"
    step_dir.mkdir()
    path = step_dir / "mp_rank_00_model_states.pt"
    path.write_bytes(saved(attack(marker)))
    manifest.seal(step_dir)
    manifest.verify(step_dir)
    message = refusal(path)
    assert name in message and "nothing in it was run" in message
    assert not marker.exists()
    # the attack is real: the unsafe way runs it
    try:
        torch.load(path, weights_only=False)
    except Exception:  # the result of the call need not be loadable
        pass
    assert marker.exists()


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(data: bytes, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3", "byteorder": b"little", **more}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript")
@pytest.mark.parametrize(
    "wrap",
    [
        pickle.dumps,
        lambda attack: saved(attack, _use_new_zipfile_serialization=False),
        lambda attack: tar_of(pickle.dumps(attack)),
        lambda attack: zip_of(pickle.dumps(attack)),
        lambda attack: zip_of(saved(attack)),
        lambda attack: zip_of(pickle.dumps(attack), **{"constants.pkl": pickle.dumps(attack)}),
    ],
    ids=["pickle", "legacy", "tar", "zip", "zip in zip", "torchscript"],
)
def test_a_malicious_pickle_in_any_wrapping_is_refused_and_not_run(tmp_path, wrap):
    path, marker = tmp_path / "bad.pt", tmp_path / "marker"
    path.write_bytes(wrap(touch_by_os(marker)))
    refusal(path)
    refusal(path, mmap=True)
    assert not marker.exists()


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Innocent])
def test_a_value_that_is_not_plain_is_refused_by_name(tmp_path, value):
    path = tmp_path / "bad.pt"
    path.write_bytes(saved(value))
    assert "numpy" in refusal(path) or "Innocent" in refusal(path)


def test_an_omegaconf_object_is_refused_with_the_way_to_save_it(tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(saved(OmegaConf.create({"model": {"n_layers": 2}})))
    message = refusal(path)
    assert "omegaconf.dictconfig.DictConfig" in message and "OmegaConf.to_container(config, resolve=True)" in message


def test_extra_classes_are_allowed_for_one_load_only(tmp_path):
    path = tmp_path / "extra.pt"
    path.write_bytes(saved(Innocent()))
    assert isinstance(safe_load.load(path, extra_allowed=[Innocent])["last"], Innocent)
    assert "Innocent" in refusal(path)
    path.write_bytes(saved([Innocent(), np.float64(1.0)]))
    message = refusal(path, extra_allowed=[Innocent])
    assert "Innocent" not in message and "numpy" in message


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"\x80\x02}", b"not a checkpoint at all" * 50])
def test_a_file_that_torch_did_not_write_is_refused(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_the_format_before_torch_1_6_is_refused_also_when_harmless(tmp_path):
    path = tmp_path / "legacy.pt"
    torch.save(PLAIN, path, _use_new_zipfile_serialization=False)
    assert "torch 1.6 or later" in refusal(path)


def test_running_out_of_memory_is_not_blamed_on_the_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "good.pt"
    torch.save(PLAIN, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert "MemoryError" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.pt")
    assert "not a regular file but a folder" in refusal(tmp_path)


def test_a_damaged_file_loads_or_raises_checkpoint_error(tmp_path):
    """Flips inside tensors load (the manifest finds those); elsewhere torch fails in many ways, all caught."""
    good, path, generator = saved(Innocent()), tmp_path / "damaged.pt", random.Random(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(good)
        if trial % 4 == 0:
            del damaged[generator.randrange(len(good)) :]
        for _ in range(trial % 4):
            damaged[generator.randrange(min(1200, len(good)))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            safe_load.load(path, extra_allowed=[Innocent])
        except CheckpointError as err:
            refused += str(err).startswith(f"{path}: ")
    assert refused > 150
