"""The operations of the layer: tensors and numbers in, tensors out. `reference` defines what is right.

Letters as in docs/gsa.md: B batch, T queries, S keys, H query heads, G key/value heads, D head width, J and E the
indexer's heads and width, R sampled rows, N rows and V columns of logits. The T queries are the last of the S
positions; in training T = S. Two inputs appear in several operations:

- `bits`, (B, T, ceil(S / 32)) int32: the selected keys of each query as packed bits; key s is bit s % 32 of word
  s // 32. None: every visible key is selected.
- `doc_start`, (B, T) int64: the position at which the document of each query begins. It never decreases along T,
  because documents follow one another; Triton's loops rely on that. None: every position up to the query is visible.

Three backends implement the operations: "reference" in plain PyTorch on whole (B, T, S) tensors, "chunked" in PyTorch
on one chunk of queries at a time, for any device, and "triton" for GPUs.

Every operation checks rank, sizes, dtypes and devices of its inputs before it calls a backend and raises ValueError
with the name of the operation and of the argument. The parts of the reference that are exported here as well
(`visible_keys`, `index_scores`, `choose`, ...) do not check.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from gsa.kernels import chunked, reference
from gsa.kernels.operands import EXACT, FLOATING, Index, InputCheck, Mode, Selection, SelectionRule, check_rule
from gsa.kernels.recompute_cache import recomputation_contexts, reuse_when_recomputing
from gsa.kernels.reference import attention_probabilities, choose, index_scores, pack, top_keys, unpack, visible_keys

__all__ = [
    "Backend",
    "Index",
    "Mode",
    "Selection",
    "SelectionRule",
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
    "recomputation_contexts",
    "select",
    "silu_product",
    "top_keys",
    "unpack",
    "visible_keys",
]


Backend = Literal["reference", "chunked", "triton"]


def _module(backend: str) -> ModuleType:
    if backend == "chunked":
        return chunked
    if backend == "reference":
        return reference
    if backend == "triton":
        from gsa.kernels import triton_backend

        return triton_backend
    raise ValueError(f"backend={backend!r} is not one of {', '.join(get_args(Backend))}")


# -- attention ------------------------------------------------------------------------------------------


@torch.no_grad()
def select(
    backend: Backend, index: Index, alpha: Tensor, v_ref: Tensor, doc_start: Tensor | None, rule: SelectionRule
) -> Selection:
    """Which keys each query attends to, and how many: docs/gsa.md, 3 to 5. Carries no gradient.

    alpha: 0-dim, the indexer's temperature; mode "entropy" uses it. v_ref: 0-dim, the running mean of the variance;
    mode "variance" uses it.
    """
    check = InputCheck("select", index.q.device)
    check.index(index)
    check.tensor("alpha", alpha, "", FLOATING)
    check.tensor("v_ref", v_ref, "", FLOATING)
    check.visibility(None, doc_start, keys="index.k")
    check_rule("select", rule)
    bits, k, statistic = reuse_when_recomputing(lambda: _module(backend).select(index, alpha, v_ref, doc_start, rule))
    return Selection(bits if bits.shape[-1] else None, k, statistic if statistic.numel() else None)


def attend(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, doc_start: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with scale 1/sqrt(D) over the selected keys (docs/gsa.md, 6), differentiable in q, k and v.

    q: (B, T, H, D); k, v: (B, S, G, D), all of one dtype. Query head h uses key/value head h // (H / G).
    Returns the output (B, T, H, D), and the log-sum-exp of each row, (B, H, T) float32 without gradient, which
    `alignment_kl` of the same backend can use; None from backends that do not compute it.
    """
    _check_heads("attend", q, k, bits, doc_start).tensor("v", v, "BSGD", (q.dtype,))
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

    p is the attention probability averaged over heads. q, k: as for `attend`. lse: what `attend` returned, or None.
    alpha: 0-dim. rows: (R,) int64, ascending query positions. Differentiable in `index` and alpha only.
    Returns nats, 0-dim, float32 (float64 for float64 input).
    """
    check = _check_heads("alignment_kl", q, k, bits, doc_start)
    check.index(index)
    check.tensor("alpha", alpha, "", FLOATING)
    check.tensor("rows", rows, "R", (torch.int64,))
    if lse is not None:
        check.tensor("lse", lse, "BHT", (torch.float32,))
    q, k = q.detach(), k.detach()
    if backend == "reference":
        return reference.alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows)
    return _AlignmentKL.apply(backend, q, k, lse, *index, alpha, bits, doc_start, rows)


def _check_heads(operation: str, q: Tensor, k: Tensor, bits: Tensor | None, doc_start: Tensor | None) -> InputCheck:
    check = InputCheck(operation, q.device)
    check.tensor("q", q, "BTHD", FLOATING)
    check.tensor("k", k, "BSGD", (q.dtype,))
    check.groups()
    check.visibility(bits, doc_start)
    return check


class _AlignmentKL(torch.autograd.Function):
    """A backend computes the loss together with its gradients; the backward pass only scales them.

    The backend's gradients are those of index.q and weight at the sampled rows, of index.k, bias and alpha.
    """

    @staticmethod
    def forward(ctx, backend, q, k, lse, index_q, index_k, weight, bias, alpha, bits, doc_start, rows):
        index = Index(index_q, index_k, weight, bias)
        loss, *gradients = reuse_when_recomputing(
            lambda: _module(backend).alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows)
        )
        ctx.save_for_backward(rows, *gradients)
        ctx.length = q.shape[1]
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        rows, d_q, d_k, d_weight, d_bias, d_alpha = ctx.saved_tensors

        def at_all_rows(gradient: Tensor) -> Tensor:
            """(B, R, ...) to (B, T, ...), 0 at the rows that were not sampled."""
            whole = gradient.new_zeros(gradient.shape[0], ctx.length, *gradient.shape[2:])
            whole[:, rows] = (gradient * d_loss).to(whole.dtype)
            return whole

        d_index = at_all_rows(d_q), d_k * d_loss, at_all_rows(d_weight), d_bias * d_loss
        return None, None, None, None, *d_index, d_alpha * d_loss, None, None, None


# -- feed-forward ---------------------------------------------------------------------------------------


def silu_product(backend: Backend, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for two tensors of one shape and dtype; differentiable in both.

    It saves its two inputs for the backward pass and nothing else; autograd's own product would also save silu(gate).
    """
    check = InputCheck("silu_product", gate.device)
    if gate.shape != up.shape:
        check.refuse("up", f"has shape {tuple(up.shape)}", f"wanted that of gate, {tuple(gate.shape)}")
    check.dtype_and_device("gate", gate, FLOATING)
    check.dtype_and_device("up", up, (gate.dtype,))
    return _module(backend).silu_product(gate, up)


# -- loss head ------------------------------------------------------------------------------------------


def fold_logits(
    backend: Backend, logits: Tensor, targets: Tensor, start: int, top: Tensor, mass: Tensor, label: Tensor
) -> None:
    """Adds a block of logits to the running statistics of its rows, in place; log Z = top + log(mass) at the end.

    logits: (N, V), columns `start` to start + V of the vocabulary, float32 or float64; overwritten. targets: (N,)
    int64, with any value outside the vocabulary where a row has no target. top, mass, label: (N,), of the dtype of
    logits; -inf, 0 and 0 before the first block. label becomes the logit of the target. All are contiguous.
    """
    check = _check_logits("fold_logits", logits, targets)
    for name, x in (("top", top), ("mass", mass), ("label", label)):
        check.tensor(name, x, "N", (logits.dtype,), contiguous=True)
    _loss_module(backend).fold_logits(logits, targets, start, top, mass, label)


def logits_gradient(
    backend: Backend, logits: Tensor, targets: Tensor, start: int, log_z: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """(softmax - one-hot) * scale of a block of logits, (N, V), rounded once to `dtype`; logits are overwritten.

    logits, targets, start: as for `fold_logits`. log_z, scale: (N,), contiguous, of the dtype of logits.
    """
    check = _check_logits("logits_gradient", logits, targets)
    for name, x in (("log_z", log_z), ("scale", scale)):
        check.tensor(name, x, "N", (logits.dtype,), contiguous=True)
    if dtype not in FLOATING:
        check.refuse("dtype", f"is {dtype}", "wanted a floating-point dtype")
    return _loss_module(backend).logits_gradient(logits, targets, start, log_z, scale, dtype)


def _check_logits(operation: str, logits: Tensor, targets: Tensor) -> InputCheck:
    check = InputCheck(operation, logits.device)
    check.tensor("logits", logits, "NV", EXACT, contiguous=True)
    check.tensor("targets", targets, "N", (torch.int64,), contiguous=True)
    return check


def _loss_module(backend: str) -> ModuleType:
    return _module("triton") if backend == "triton" else reference


# -- matrix products ------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """a @ b, (N, M), accumulated and returned in `exact`, float32 or float64: bfloat16 logits are off by a hundredth.

    a: (N, K); b: (K, M), of the same dtype.
    """
    check = InputCheck("product", a.device)
    if exact not in EXACT:
        check.refuse("exact", f"is {exact}", "wanted float32 or float64")
    check.tensor("a", a, "NK", FLOATING)
    check.tensor("b", b, "KM", (a.dtype,))
    return _product(a, b, exact)


def _product(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    # under autocast a product in `exact` would be made in a narrower dtype
    with nullcontext() if a.device.type == "meta" else torch.autocast(a.device.type, enabled=False):
        if a.dtype == exact:
            return a @ b
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=exact)
        return a.to(exact) @ b.to(exact)


def add_product(backend: Backend, total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the dtype of total, float32 or float64.

    total: (N, M); a: (N, K); b: (K, M), a and b of one dtype, which may be narrower than that of total.
    """
    check = InputCheck("add_product", total.device)
    check.tensor("total", total, "NM", EXACT)
    check.tensor("a", a, "NK", FLOATING)
    check.tensor("b", b, "KM", (a.dtype,))
    if backend == "triton" and total.is_cuda and a.dtype != total.dtype:
        # one pass over memory, that of the product, instead of three; torch takes a float32 sum here since 2.10
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += _product(a, b, total.dtype)


visible, saved_by_checkpointing = visible_keys, recomputation_contexts  # their earlier names, for others' imports
