"""silu(gate) * up in Triton: forward and backward, each in one pass over memory.

Shapes and meaning: `silu_product` in gsa/kernels/__init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def silu_forward(Gate, Up, Out, numel, BLOCK: tl.constexpr):
    """Out = silu(Gate) * Up, numel elements each, computed in float32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < numel
    gate = tl.load(Gate + o, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(Up + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(Out + o, (gate * tl.sigmoid(gate) * up).to(Out.dtype.element_ty), mask=inside)


@triton.jit
def silu_backward(Gate, Up, dOut, dGate, dUp, numel, BLOCK: tl.constexpr):
    """dGate and dUp, the gradients by Gate and Up, from dOut; numel elements each, computed in float32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < numel
    gate = tl.load(Gate + o, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(Up + o, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(dOut + o, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    d_gate = d_out * up * opened * (1 + gate * (1 - opened))
    tl.store(dGate + o, d_gate.to(dGate.dtype.element_ty), mask=inside)
    tl.store(dUp + o, (d_out * gate * opened).to(dUp.dtype.element_ty), mask=inside)


BLOCK = 1024
OPTIONS = {"num_warps": 4}


def silu_product(gate, up):
    return _SiluProduct.apply(gate.contiguous(), up.contiguous())


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        silu_forward[_grid(gate)](gate, up, out, gate.numel(), BLOCK=BLOCK, **OPTIONS)
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        silu_backward[_grid(gate)](gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=BLOCK, **OPTIONS)
        return d_gate, d_up


def _grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)
