"""Next-token cross-entropy from hidden states, without the (N, V) logits.

The logits of 16K tokens with a vocabulary of 152K would take 10 GB in float32. Here they exist for one block of the
vocabulary at a time and are computed again in the backward pass. That is a third more arithmetic in the head, but each
block of the weight's gradient is written once, while chunks of rows would read and write all of it for every chunk
(benchmarks/results/head_cpu_*.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import FunctionCtx

from gsa import kernels

IGNORE = -100
"""Target of a position without anything to predict."""
BLOCK_BYTES = 64 * 2**20
"""Size of one block of logits in float32 or float64."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    n_targets: torch.Tensor | float,
    backend: kernels.Backend = "chunked",
) -> torch.Tensor:
    """Sum over valid rows of -log softmax(hidden @ weight.T)[target], divided by n_targets.

    hidden: (N, d); weight: (V, d), same dtype; targets: (N,) int64, -100 where there is nothing to predict.
    n_targets: the divisor, so that the losses of parts of a batch add up to that of the whole; 0 counts as 1.
    Returns nats, 0-dim, float32 (float64 for float64 input); logits are float32 also for bfloat16 input.
    Besides its gradients it needs memory for one block of logits and, in the backward pass, for the gradient of
    hidden in float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, n_targets, backend)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        n_targets: torch.Tensor | float,
        backend: kernels.Backend,
    ) -> torch.Tensor:
        exact = _exact(hidden)
        top = hidden.new_full(targets.shape, -torch.inf, dtype=exact)
        mass, label = torch.zeros_like(top), torch.zeros_like(top)
        for block in _blocks(weight, len(targets), exact):
            logits = kernels.product(hidden, weight[block].t(), exact)
            kernels.fold_logits(backend, logits, targets, block.start, top, mass, label)
        log_z = top + mass.log()
        # filled on the device: torch.tensor(number, device=...) would copy from the host and wait
        given = isinstance(n_targets, torch.Tensor)
        divisor = n_targets.to(exact) if given else hidden.new_full((), float(n_targets), dtype=exact)
        divisor = torch.where(divisor == 0, 1, divisor)
        ctx.save_for_backward(hidden, weight, targets, log_z, divisor)
        ctx.backend = backend
        return torch.where(targets != IGNORE, log_z - label, 0.0).sum() / divisor

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, log_z, divisor = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        exact = log_z.dtype
        d_hidden = torch.zeros_like(hidden, dtype=exact) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        scale = torch.where(targets != IGNORE, grad / divisor, 0.0)
        for block in _blocks(weight, len(targets), exact):
            logits = kernels.product(hidden, weight[block].t(), exact)
            d_logits = kernels.logits_gradient(ctx.backend, logits, targets, block.start, log_z, scale, hidden.dtype)
            if need_hidden:
                kernels.add_product(ctx.backend, d_hidden, d_logits, weight[block])
            if need_weight:
                torch.mm(d_logits.t(), hidden, out=d_weight[block])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def _exact(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def n_blocks(n_rows: int, vocab_size: int) -> int:
    """How many blocks of logits the head computes in one pass, in float32."""
    return -(-vocab_size // _block_width(n_rows, torch.float32))


def _block_width(n_rows: int, exact: torch.dtype) -> int:
    width = max(1, BLOCK_BYTES // (max(1, n_rows) * exact.itemsize))
    return width - width % 128 if width > 128 else width  # whole tiles of the matrix product


def _blocks(weight: torch.Tensor, n_rows: int, exact: torch.dtype) -> Iterator[slice]:
    """Ranges of the vocabulary whose logits for n_rows rows take at most BLOCK_BYTES."""
    width = _block_width(n_rows, exact)
    for start in range(0, weight.shape[0], width):
        yield slice(start, min(start + width, weight.shape[0]))
