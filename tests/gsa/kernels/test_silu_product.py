"""silu(gate) * up on every backend against float64, forward and backward, and what it saves for the backward pass."""

from __future__ import annotations

from support import triton_interpreter  # isort: skip  before anything imports triton

import pytest
import torch
import torch.nn.functional as F

from gsa import kernels
from gsa.kernels import triton_feed_forward

SHAPE = (3, 37, 11)  # no multiple of a block


def operands(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*SHAPE, generator=random).mul(4).to(device, dtype) for _ in range(3)]
    drawn[0].flatten()[:2] = torch.tensor([-60.0, 60.0])  # where exp could overflow
    return drawn


def differences(backend: str, dtype: torch.dtype, device: str) -> list[float]:
    """Largest differences of the product and of both gradients from float64, relative to the largest value."""
    gate, up, d_out = operands(dtype, device)
    found = []
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        leaves = gate.to(to).requires_grad_(), up.to(to).requires_grad_()
        product = kernels.silu_product(name, *leaves)
        found.append([product.double(), *(g.double() for g in torch.autograd.grad(product, leaves, d_out.to(to)))])
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)]


BACKENDS = [("chunked", "cpu"), ("triton", triton_interpreter.DEVICE)]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_product_and_gradients_equal_float64(backend, device, dtype, monkeypatch):
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float32  # the kernels' own precision
    monkeypatch.setattr(triton_feed_forward, "BLOCK", 64)
    off = differences(backend, dtype, device)
    assert max(off) < BOUNDS[dtype], off


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_only_the_operands_are_saved(backend, device):
    gate, up, _ = (x.requires_grad_() for x in operands(torch.float32, device))
    saved: set[int] = set()

    def save(x: torch.Tensor) -> torch.Tensor:
        saved.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        kernels.silu_product(backend, gate, up)
        assert saved == {gate.data_ptr(), up.data_ptr()}
        F.silu(gate) * up
        assert len(saved) == 3  # autograd's own


def test_operands_need_not_be_contiguous():
    gate, up, d_out = (x.transpose(0, 1) for x in operands(torch.float32, triton_interpreter.DEVICE))
    leaves = gate.requires_grad_(), up.requires_grad_()
    ours = torch.autograd.grad(kernels.silu_product("triton", *leaves), leaves, d_out)
    exact = torch.autograd.grad(kernels.silu_product("reference", *leaves), leaves, d_out)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kernel, there, instead",
    [
        ("silu_forward", "gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
        ("silu_backward", "(1 + gate * (1 - opened))", "(1 + gate * opened)"),
        ("silu_backward", "d_out * gate * opened", "d_out * opened"),
        ("silu_backward", "tl.load(dOut + o, mask=inside", "tl.load(dOut + o, mask=o < numel - 1"),
    ],
)
def test_a_wrong_kernel_is_caught(kernel, there, instead, monkeypatch, tmp_path):
    triton_interpreter.garbage(monkeypatch)
    wrong = triton_interpreter.rewritten(triton_feed_forward, tmp_path, (there, instead))
    monkeypatch.setattr(triton_feed_forward, kernel, getattr(wrong, kernel))
    off = differences("triton", torch.float32, triton_interpreter.DEVICE)
    assert not all(value < 1e-5 for value in off)
