"""Exported weights come back bit for bit, in their dtypes, under all their names; damage is refused."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gsa.checkpoint.manifest import CheckpointError
from gsa.weights import load_weights, save_weights

CONFIG = {"n_layers": 2, "rope_base": 1e4, "tie_embeddings": True, "adaptive_k": "variance", "note": None}


def weights() -> dict[str, torch.Tensor]:
    """A bf16 model as it trains: a float32 buffer, a tied head, a tensor that is a part of another."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(16, 8, generator=generator).bfloat16()
    fused = torch.randn(6, 8, generator=generator).bfloat16()
    return {
        "model.embed_tokens.weight": embedding,
        "layers.0.v_ref": torch.tensor(0.1234567, dtype=torch.float32),
        "layers.0.q.weight": fused[:4],
        "layers.0.k.weight": fused[4:],
        "layers.0.whole.weight": fused,
        "layers.0.transposed": fused.t(),
        "layers.0.empty": torch.empty(0, 8),
        "layers.1.empty": torch.empty(0, 8),
        "counts": torch.arange(3),
        "lm_head.weight": embedding,
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)))


def test_every_tensor_comes_back_bit_for_bit_under_its_name(tmp_path):
    saved = weights()
    saved["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_weights(saved, {"model": CONFIG, "training": {}}, tmp_path / "new" / "folder")
    config, loaded = load_weights(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert set(loaded) == set(saved)
    assert all(same_bits(loaded[name], saved[name]) for name in saved)
    assert loaded["layers.0.v_ref"].dtype == torch.float32
    assert loaded["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_tied_names_are_stored_once_and_share_one_tensor(tmp_path):
    save_weights(weights(), {"model": CONFIG}, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()
        assert file.metadata()["format"] == "pt"  # other tools look for it
    _, loaded = load_weights(tmp_path)
    assert loaded["lm_head.weight"] is loaded["model.embed_tokens.weight"]
    # views of one storage with other strides or dtypes, and equal values in another storage, are not tied
    square = torch.randn(4, 4)
    apart = {"a": square, "b": square.t(), "c": square.clone(), "d": square.view(torch.int32)}
    save_weights(apart, {"model": CONFIG}, tmp_path)
    _, loaded = load_weights(tmp_path)
    assert all(same_bits(loaded[name], apart[name]) for name in apart)
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 4


def test_a_tied_model_is_restored_from_its_state_dict(tmp_path):
    def model() -> torch.nn.Module:
        module = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16, bias=False)).bfloat16()
        module[1].weight = module[0].weight
        module.register_buffer("v_ref", torch.tensor(0.3))
        return module

    torch.manual_seed(0)
    trained, fresh = model(), model()
    save_weights(trained.state_dict(), {"model": CONFIG}, tmp_path)
    fresh.load_state_dict(load_weights(tmp_path)[1])
    assert same_bits(fresh[1].weight.detach(), trained[0].weight.detach())
    assert fresh.v_ref.dtype == torch.float32 and fresh.v_ref == trained.v_ref


def test_a_configuration_that_is_not_plain_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"model\.d is .*numpy\.int64"):
        save_weights(weights(), {"model": {"d": np.int64(8)}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_previous_export(tmp_path):
    save_weights(weights(), {"model": CONFIG}, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
            with pytest.raises(CheckpointError, match="model.safetensors could not be written: .*File too large"):
                save_weights(weights(), {"model": CONFIG}, tmp_path)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\xff" * 100])
def test_missing_or_damaged_weights_are_refused_by_name(tmp_path, content):
    save_weights(weights(), {"model": CONFIG}, tmp_path)
    path = tmp_path / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors: .*restore it from a copy"):
        load_weights(tmp_path)


def test_weights_cut_off_are_refused(tmp_path):
    save_weights(weights(), {"model": CONFIG}, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        load_weights(tmp_path)


@pytest.mark.parametrize("tied", [5, ["a"], {"head": "nothing"}, {"head": ["a"]}])
def test_a_damaged_table_of_tied_names_is_refused(tmp_path, tied):
    save_weights(weights(), {"model": CONFIG}, tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(header | {"tied": tied}))
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        load_weights(tmp_path)


def test_equal_weights_are_equal_files(tmp_path):
    for i in range(8):  # with several metadata keys safetensors would write a random order each time
        save_weights(weights(), {"model": CONFIG}, tmp_path / str(i))
    assert len({(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(8)}) == 1


def test_a_config_of_another_kind_or_a_newer_format_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: cannot be read: No such file"):
        load_weights(tmp_path)
    for content, message in [
        ({"n_layers": 2}, "config.json: not written by save_weights"),
        ({"format": 1, "model": []}, "config.json: not written by save_weights"),
        ({"format": 2, "layers": []}, "config.json: format 2; .*update the project"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path)
