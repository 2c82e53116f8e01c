"""The loss head on Triton's kernels, forward and backward, against the float64 loss. See test_triton.py."""

from __future__ import annotations

from support import triton_interpreter  # isort: skip  before anything imports triton

import pytest
import torch
import torch.nn.functional as F

from gsa import loss as loss_module
from gsa.kernels import triton_loss
from gsa.loss import linear_cross_entropy


def problem(dtype: torch.dtype, n: int = 37, d: int = 16, v: int = 301):
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, d, generator=random).to(triton_interpreter.DEVICE, dtype) for size in (n, v))
    targets = torch.randint(0, v, (n,), generator=random).to(triton_interpreter.DEVICE)
    targets[::5] = -100
    targets[1:3] = torch.tensor([0, v - 1])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def differences(dtype: torch.dtype) -> dict[str, float]:
    """Largest differences of the loss and of both gradients from float64, relative to the largest value."""
    hidden, weight, targets = problem(dtype)
    ours = linear_cross_entropy(hidden, weight, targets, 20.0, backend="triton")
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum") / 20
    found = [ours, *torch.autograd.grad(ours, (hidden, weight))]
    wanted = [exact, *torch.autograd.grad(exact, (hidden, weight))]
    return {
        name: ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for name, a, b in zip(("loss", "hidden", "weight"), found, wanted, strict=True)
    }


@pytest.fixture(autouse=True)
def ragged(monkeypatch):
    """Blocks of 70 columns of the vocabulary, read 32 at a time; fresh memory holds NaN."""
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 70 * 37 * 4)
    monkeypatch.setattr(triton_loss, "BLOCK", 32)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_float64(dtype):
    off = differences(dtype)
    assert off["loss"] < 1e-6
    assert max(off["hidden"], off["weight"]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    "kernel, there, instead",
    [
        ("fold_rows", "mass * tl.exp(top - new_top)", "mass"),
        ("fold_rows", "at < width", "at < width - 1"),
        ("gradient_rows", "c == at", "c == at + 1"),
        ("gradient_rows", "mask=c < width)", "mask=c < width - 1)"),
    ],
)
def test_a_wrong_kernel_is_caught(kernel, there, instead, monkeypatch, tmp_path):
    import importlib.util
    from pathlib import Path

    source = Path(triton_loss.__file__).read_text()
    before, body = source.split(f"def {kernel}(")
    assert there in body
    wrong = tmp_path / "wrong_loss.py"
    wrong.write_text(f"{before}def {kernel}({body.replace(there, instead)}")
    spec = importlib.util.spec_from_file_location("wrong_loss", wrong)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if triton_interpreter.DEVICE == "cpu" else "0")
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton_loss, kernel, getattr(module, kernel))
    off = differences(torch.float32)
    assert not all(value < 1e-5 for value in off.values())
