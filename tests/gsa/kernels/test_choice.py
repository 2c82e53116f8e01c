"""Which backend runs: a fault is found by a check, told, and fallen back from; an explicit wish is met or refused."""

from __future__ import annotations

import pytest
import torch

from gsa.kernels import choice, chunked
from gsa.kernels.choice import Shape, fault_of, resolve, why_not_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(n_heads=8, n_kv_heads=2, d_head=16, n_indexer_heads=2, d_indexer=16, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_backend_has_no_fault(dtype):
    assert fault_of("chunked", SHAPE._replace(dtype=dtype), CPU) is None


@pytest.mark.parametrize(
    "name, wrong, fault",
    [
        ("_flash", lambda honest: lambda *x: (honest(*x)[0] * 1.01, honest(*x)[1]), "its output is off by 1.0e-02"),
        ("_flash_backward", lambda honest: lambda *x: [y * 1.01 for y in honest(*x)], "its q is off by"),
        ("_probabilities", lambda honest: lambda *x: honest(*x).roll(1, -1), "its loss is off by"),
        ("_pack", lambda honest: lambda mask: honest(mask.roll(1, -1)), "a hidden key"),
        ("_gates", lambda honest: lambda q, k, bias: honest(q, k.roll(1, 1), bias), "leaves out a better key"),
        ("_unpack", lambda honest: lambda *x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_backend_is_found_out(monkeypatch, name, wrong, fault):
    monkeypatch.setattr(chunked, name, wrong(getattr(chunked, name)))
    assert fault in fault_of("chunked", SHAPE, CPU)


def test_auto_takes_triton_where_it_passes_and_says_why_where_not(monkeypatch):
    assert resolve("auto", SHAPE, CPU) == ("chunked", None)
    monkeypatch.setattr(choice, "fault_of", lambda *_: None)
    assert resolve("auto", SHAPE, GPU) == ("triton", None)
    monkeypatch.setattr(choice, "fault_of", lambda *_: "its q is off")
    assert resolve("auto", SHAPE, GPU) == ("chunked", "its q is off")
    backend, fault = resolve("auto", SHAPE._replace(d_head=48), GPU)
    assert backend == "chunked" and "model.d_head=48" in fault


def test_an_explicit_wish_is_met_or_refused():
    assert resolve("reference", SHAPE, CPU) == ("reference", None)
    assert resolve("triton", SHAPE, GPU) == ("triton", None)
    with pytest.raises(ValueError, match="training.backend=triton cannot run: Triton's kernels need a GPU"):
        resolve("triton", SHAPE, CPU)
    with pytest.raises(ValueError, match="model.d_indexer=24 is not a power of two"):
        resolve("triton", SHAPE._replace(d_indexer=24), GPU)
    assert "3 query heads share" in why_not_triton(SHAPE._replace(n_heads=6), GPU)
