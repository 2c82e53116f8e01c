"""The operations of the layer: tensors and numbers in, tensors out. `reference` defines what is right.

Letters as in docs/gsa.md: B batch, T queries, S keys, H query heads, G key/value heads, D head width, J and
E the indexer's heads and width. The T queries are the last of the S positions; in training T = S. `bits` is a
selected set as packed bits, (B, T, ceil(S / 32)) int32, bit s % 32 of word s // 32; None selects every visible key.
`doc_start`, (B, T) int64, is where the document of each query begins; it never decreases along T, for documents
follow one another, and Triton's loops rely on that. None when every position up to the query is visible.

Three backends implement the operations: "reference" in plain PyTorch on whole (B, T, S) tensors, "chunked" in
PyTorch a chunk of queries at a time, on any device, and "triton" for GPUs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gsa.kernels import chunked, reference
from gsa.kernels.recompute_cache import kept, saved_by_checkpointing
from gsa.kernels.reference import attention_probabilities, choose, index_scores, pack, top_keys, unpack, visible

__all__ = [
    "Backend",
    "Index",
    "Selection",
    "add_product",
    "alignment_kl",
    "attend",
    "attention_probabilities",
    "choose",
    "fold_logits",
    "index_scores",
    "logits_gradient",
    "pack",
    "product",
    "saved_by_checkpointing",
    "select",
    "silu_product",
    "top_keys",
    "unpack",
    "visible",
]

Backend = Literal["reference", "chunked", "triton"]


class Index(NamedTuple):
    """What scores are made of: q (B, T, J, E), k (B, S, E), weight (B, T, J) before its sigmoid, bias (J,)."""

    q: Tensor
    k: Tensor
    weight: Tensor
    bias: Tensor


class Selection(NamedTuple):
    """bits: the set of each query, None when that is every visible key. k: (B, T) int64, its size. statistic: (B, T),
    variance or entropy of the scores, None when the rule needs neither."""

    bits: Tensor | None
    k: Tensor
    statistic: Tensor | None


def _module(backend: str) -> ModuleType:
    if backend == "chunked":
        return chunked
    if backend == "reference":
        return reference
    if backend == "triton":
        from gsa.kernels import triton_backend

        return triton_backend
    raise ValueError(f"backend={backend!r} is not one of {', '.join(get_args(Backend))}")


@torch.no_grad()
def select(
    backend: Backend,
    index: Index,
    alpha: Tensor,
    v_ref: Tensor,
    doc_start: Tensor | None,
    *,
    mode: str,
    temperature: float,
    k_base: int,
    k_min: int,
    k_max: int,
) -> Selection:
    """How many keys each query attends to, and which: docs/gsa.md, 3 to 5. Carries no gradient.

    alpha: 0-dim, the indexer's temperature, of which the entropy is taken. v_ref: 0-dim, the running variance.
    mode: "off", "variance", "entropy".
    """
    rule = (mode, temperature, k_base, k_min, k_max)
    bits, k, statistic = kept(lambda: _module(backend).select(index, alpha, v_ref, doc_start, *rule))
    return Selection(bits if bits.shape[-1] else None, k, statistic if statistic.numel() else None)


def attend(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, doc_start: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention, scale 1/sqrt(D), over the selected keys (docs/gsa.md, 6), differentiable in q, k and v.

    q: (B, T, H, D); k, v: (B, S, G, D), query head h uses key/value head h // (H / G). Returns (B, T, H, D), and
    the log-sum-exp of each row (B, H, T) float32, without gradient, where the backend has it for `alignment_kl`.
    """
    return _module(backend).attend(q, k, v, bits, doc_start)


def alignment_kl(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    index: Index,
    alpha: Tensor,
    bits: Tensor | None,
    doc_start: Tensor | None,
    rows: Tensor,
) -> Tensor:
    """Mean over batch and `rows` of KL(p || softmax(alpha * scores)) over the selected keys: docs/gsa.md, 7.

    p is the attention probability averaged over heads. rows: (R,) int64, ascending. Differentiable in `index` and
    alpha alone. Returns nats, 0-dim, float32 at least. lse: what `attend` returned.
    """
    q, k = q.detach(), k.detach()
    if backend == "reference":
        return reference.alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows)
    return _AlignmentKL.apply(backend, q, k, lse, *index, alpha, bits, doc_start, rows)


def silu_product(backend: Backend, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for two tensors of one shape; differentiable in both.

    It keeps them for the backward pass and nothing else: autograd's own product would keep silu(gate) too.
    """
    return _module(backend).silu_product(gate, up)


def fold_logits(
    backend: Backend, logits: Tensor, targets: Tensor, start: int, top: Tensor, mass: Tensor, label: Tensor
) -> None:
    """Takes a block of logits up into the running statistics of its rows, in place: log Z = top + log(mass).

    logits: (N, width), of the vocabulary from `start` on, float32 at least; overwritten. targets: (N,) int64, any
    value where a row has none. top, mass, label: (N,) like logits, -inf, 0 and 0 before the first block; label
    becomes the logit of the target.
    """
    _loss_module(backend).fold_logits(logits, targets, start, top, mass, label)


def logits_gradient(
    backend: Backend, logits: Tensor, targets: Tensor, start: int, log_z: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """(softmax - one-hot) * scale of a block of logits, (N, width), rounded once to `dtype`; overwrites logits.

    log_z, scale: (N,) like logits. Else as for `fold_logits`.
    """
    return _loss_module(backend).logits_gradient(logits, targets, start, log_z, scale, dtype)


def product(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """a @ b of matrices, accumulated and returned in `exact`: rounded to bfloat16, logits are off by a hundredth."""
    if a.dtype == exact:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=exact)
    return a.to(exact) @ b.to(exact)


def add_product(backend: Backend, total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in total's dtype, float32 at least; a and b of one dtype, maybe a narrower one."""
    if backend == "triton" and total.is_cuda and a.dtype != total.dtype:
        # in the product's own pass over memory, instead of two more; a float32 sum is taken since torch 2.10
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product(a, b, total.dtype)


def _loss_module(backend: str) -> ModuleType:
    return _module("triton") if backend == "triton" else reference


class _AlignmentKL(torch.autograd.Function):
    """A backend's loss comes with its gradients: by the rows' index.q, by index.k, the rows' weight, bias, alpha."""

    @staticmethod
    def forward(ctx, backend, q, k, lse, index_q, index_k, weight, bias, alpha, bits, doc_start, rows):
        index = Index(index_q, index_k, weight, bias)
        loss, *gradients = kept(lambda: _module(backend).alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows))
        ctx.save_for_backward(rows, *gradients)
        ctx.length = q.shape[1]
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        rows, d_q, d_k, d_weight, d_bias, d_alpha = ctx.saved_tensors

        def spread(gradient: Tensor) -> Tensor:
            whole = gradient.new_zeros(gradient.shape[0], ctx.length, *gradient.shape[2:])
            whole[:, rows] = (gradient * d_loss).to(whole.dtype)
            return whole

        d_index = spread(d_q), d_k * d_loss, spread(d_weight), d_bias * d_loss
        return None, None, None, None, *d_index, d_alpha * d_loss, None, None, None
