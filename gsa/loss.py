"""Next-token cross-entropy from hidden states, without the (N, V) logits.

The logits of 16K tokens and a vocabulary of 152K take 10 GB in float32. Here they exist a chunk of rows at a
time, and the gradients are formed in the same pass, so that no chunk is computed twice.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx

IGNORE = -100
CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of logits, in the dtype of the statistics."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, n_targets: torch.Tensor | float
) -> torch.Tensor:
    """Sum over valid rows of -log softmax(hidden @ weight.T)[target], divided by n_targets.

    hidden: (N, d); weight: (V, d), same dtype; targets: (N,) int64, -100 where there is nothing to predict.
    n_targets: what to divide by, so that parts of a batch add up to the whole; 0 counts as 1.
    Returns a 0-dim tensor, float32 (float64 for float64 input), exact in float32 also from bfloat16 input.
    Beyond its gradients it holds a chunk of logits, and the weight's gradient in float32 while it is summed.
    """
    if not torch.is_grad_enabled():
        # needs_input_grad knows nothing of no_grad: evaluation would form both gradients
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, n_targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        n_targets: torch.Tensor | float,
    ) -> torch.Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        total = hidden.new_zeros((), dtype=exact)
        rows = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            valid = targets[chunk] != IGNORE
            label = targets[chunk].clamp_min(0)[:, None]
            logits = (hidden[chunk] @ weight.t()).to(exact)
            log_z = logits.logsumexp(-1)
            total += torch.where(valid, log_z - logits.gather(1, label)[:, 0], 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            # softmax - one-hot, in place of the logits; rows without a target have no gradient
            grad = logits.sub_(log_z[:, None]).exp_()
            grad.scatter_add_(1, label, grad.new_full((), -1.0).expand_as(label))
            grad = grad.mul_(valid[:, None]).to(weight.dtype)
            if need_hidden:
                d_hidden[chunk] = grad @ weight
            if need_weight:
                d_weight += grad.t() @ hidden[chunk]
        divisor = torch.as_tensor(n_targets, dtype=exact, device=hidden.device)
        divisor = torch.where(divisor == 0, 1, divisor)
        ctx.save_for_backward(d_hidden, d_weight, divisor)
        ctx.dtype = weight.dtype
        return total / divisor

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, divisor = ctx.saved_tensors
        scale = grad / divisor
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.dtype),
            None,
            None,
        )
