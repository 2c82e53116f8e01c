"""The loss head's passes over a block of logits in Triton: the forward pass reads it once, the backward pass reads
and writes it once.

Shapes and meaning: `fold_logits` and `logits_gradient` in gsa/kernels/__init__.py. One program computes a whole row, so
that the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def fold_rows(Logits, Targets, Top, Mass, Label, start, width, BLOCK: tl.constexpr):
    """Adds Logits (N, width) to the running maximum Top, sum of exponentials Mass and target's logit Label (N,)."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    top, mass = tl.load(Top + row), tl.load(Mass + row)
    for c0 in range(0, width, BLOCK):
        x = tl.load(Logits + row * width + c0 + o, mask=c0 + o < width, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    tl.store(Top + row, top)
    tl.store(Mass + row, mass)
    at = tl.load(Targets + row) - start
    if (at >= 0) & (at < width):
        tl.store(Label + row, tl.load(Logits + row * width + at))


@triton.jit
def gradient_rows(Logits, Targets, LogZ, Scale, Out, start, width, BLOCK: tl.constexpr):
    """Out (N, width) = (softmax - one-hot) * Scale (N,)."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    log_z, scale, at = tl.load(LogZ + row), tl.load(Scale + row), tl.load(Targets + row) - start
    for c0 in range(0, width, BLOCK):
        c = c0 + o
        x = tl.load(Logits + row * width + c, mask=c < width, other=0.0)
        found = (tl.exp(x - log_z) - tl.where(c == at, 1.0, 0.0)) * scale
        tl.store(Out + row * width + c, found.to(Out.dtype.element_ty), mask=c < width)


BLOCK = 1024
OPTIONS = {"num_warps": 4}


def fold_logits(logits, targets, start, top, mass, label):
    width = logits.shape[1]
    fold_rows[(len(logits),)](logits, targets, top, mass, label, start, width, BLOCK=BLOCK, **OPTIONS)


def logits_gradient(logits, targets, start, log_z, scale, dtype):
    out = torch.empty_like(logits, dtype=dtype)
    width = logits.shape[1]
    gradient_rows[(len(logits),)](logits, targets, log_z, scale, out, start, width, BLOCK=BLOCK, **OPTIONS)
    return out
