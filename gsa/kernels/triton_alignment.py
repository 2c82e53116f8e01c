"""The indexer's alignment loss and its gradients in Triton: docs/gsa.md, 7. No atomics: equal inputs give equal bits.

Three kernels run for one strip of sampled queries at a time. The first computes the loss and its gradient by the
logits, softmax(alpha * I) - p, which exists for this strip only; the second propagates that gradient to the query side
of the indexer, the third to the key side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gsa.kernels.triton_attention import FAR, LOG2E, chosen_tile, fitted, forward_rows
from gsa.kernels.triton_select import index_tile

STRIP = 512
"""Sampled queries whose gradient by the logits exists at the same time."""


@triton.jit
def align_logits(
    Q,
    K,
    Lse,
    IndexQ,
    IndexK,
    Weight,
    Bias,
    Alpha,
    Bits,
    Begin,
    Rows,
    Loss,
    dAlpha,
    dLogits,
    r0,
    C,
    N,
    T,
    S,
    W,
    scale,
    index_scale,
    G: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BITS: tl.constexpr,
):
    """Loss and dAlpha (B, N), and dLogits (B, C, S) = softmax(alpha * I) - p, of the C sampled queries from r0 on."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H: tl.constexpr = G * REP
    c = tile * BM + tl.arange(0, BM)
    ok = c < C
    m = r0 + c
    d, e = tl.arange(0, D), tl.arange(0, E)
    row = tl.load(Rows + m, mask=ok, other=0)
    begin, end = tl.load(Begin + b * N + m, mask=ok, other=0), row + S - T + 1
    alpha = tl.load(Alpha)
    first = tl.load(Begin + b * N + r0 + tile * BM) // BN * BN
    last = tl.load(Rows + r0 + tl.minimum(tile * BM + BM, C) - 1) + S - T + 1

    top = tl.full([BM], FAR, dtype=tl.float32)
    mass = tl.zeros([BM], dtype=tl.float32)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        chosen = chosen_tile(Bits, b * T + row, ok, begin, end, n0, W, HAS_BITS, BM, BN)
        k_t = tl.load(IndexK + (b * S + n)[None, :] * E + e[:, None], mask=(n < S)[None, :], other=0.0)
        x = alpha * index_tile(IndexQ, Weight, Bias, k_t, b * N + m, ok, index_scale, J, E, BM, BN)
        x = tl.where(chosen, x, FAR)
        new_top = tl.maximum(top, tl.max(x, 1))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.where(chosen, tl.exp(x - new_top[:, None]), 0.0), 1)
        top = new_top
    log_mass = top + tl.log(mass)

    loss = tl.zeros([BM], dtype=tl.float32)
    d_alpha = tl.zeros([BM], dtype=tl.float32)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        n_ok = n < S
        chosen = chosen_tile(Bits, b * T + row, ok, begin, end, n0, W, HAS_BITS, BM, BN)
        p = tl.zeros([BM, BN], dtype=tl.float32)
        for h in range(0, H):
            k_t = tl.load(K + ((b * S + n) * G + h // REP)[None, :] * D + d[:, None], mask=n_ok[None, :], other=0.0)
            q = tl.load(Q + ((b * N + m) * H + h)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
            lse = tl.load(Lse + (b * H + h) * N + m, mask=ok, other=0.0)
            s = tl.dot(q, k_t, input_precision="ieee") * (scale * LOG2E)
            p += tl.where(chosen, tl.exp2(s - lse[:, None]), 0.0)
        p = p / H
        k_t = tl.load(IndexK + (b * S + n)[None, :] * E + e[:, None], mask=n_ok[None, :], other=0.0)
        score = index_tile(IndexQ, Weight, Bias, k_t, b * N + m, ok, index_scale, J, E, BM, BN)
        log_q = alpha * score - log_mass[:, None]
        # where p underflows to 0 the term is 0, and must not become NaN by the logarithm
        loss += tl.sum(tl.where(chosen, p * (tl.log(tl.maximum(p, 1.0e-37)) - log_q), 0.0), 1)
        d_logits = tl.where(chosen, tl.exp(log_q) - p, 0.0)
        d_alpha += tl.sum(d_logits * score, 1)
        tl.store(dLogits + (b * C + c)[:, None] * S + n[None, :], d_logits, mask=ok[:, None] & n_ok[None, :])
    tl.store(Loss + b * N + m, loss, mask=ok)
    tl.store(dAlpha + b * N + m, d_alpha, mask=ok)


@triton.jit
def align_queries(
    IndexQ,
    IndexK,
    Weight,
    Bias,
    dLogits,
    Begin,
    Rows,
    dIndexQ,
    dWeight,
    dBias,
    r0,
    C,
    N,
    T,
    S,
    scale,
    J: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dIndexQ (B, N, J, E), dWeight and dBias (B, N, J), per unit of alpha; one program for one indexer head."""
    tile, b, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    c = tile * BM + tl.arange(0, BM)
    ok = c < C
    m = r0 + c
    e = tl.arange(0, E)
    begin = tl.load(Begin + b * N + m, mask=ok, other=0)
    end = tl.load(Rows + m, mask=ok, other=0) + S - T + 1
    first = tl.load(Begin + b * N + r0 + tile * BM) // BN * BN
    last = tl.load(Rows + r0 + tl.minimum(tile * BM + BM, C) - 1) + S - T + 1
    at = (b * N + m) * J + j
    q = tl.load(IndexQ + at[:, None] * E + e[None, :], mask=ok[:, None], other=0.0)
    w = tl.load(Weight + at, mask=ok, other=0.0)
    bias = tl.load(Bias + j)
    d_q = tl.zeros([BM, E], dtype=tl.float32)
    d_w = tl.zeros([BM], dtype=tl.float32)
    d_b = tl.zeros([BM], dtype=tl.float32)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        k = tl.load(IndexK + (b * S + n)[:, None] * E + e[None, :], mask=(n < S)[:, None], other=0.0)
        gate = tl.sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias)
        # align_logits writes nothing where a key is not visible
        visible = ok[:, None] & (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])
        weighted = tl.load(dLogits + (b * C + c)[:, None] * S + n[None, :], mask=visible, other=0.0) * gate
        inner = weighted * (1.0 - gate) * w[:, None]
        d_w += tl.sum(weighted, 1)
        d_b += tl.sum(inner, 1)
        d_q = tl.dot((inner * scale).to(k.dtype), k, d_q, input_precision="ieee")
    tl.store(dIndexQ + at[:, None] * E + e[None, :], d_q, mask=ok[:, None])
    tl.store(dWeight + at, d_w * w * (1.0 - w), mask=ok)
    tl.store(dBias + at, d_b, mask=ok)


@triton.jit
def align_keys(
    IndexQ,
    IndexK,
    Weight,
    Bias,
    dLogits,
    Begin,
    Rows,
    dIndexK,
    r0,
    C,
    N,
    T,
    S,
    scale,
    J: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the part of a strip to dIndexK (B, S, E) float32, per unit of alpha; one program for one tile of keys."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tile * BN + tl.arange(0, BN)
    n_ok = n < S
    e = tl.arange(0, E)
    k = tl.load(IndexK + (b * S + n)[:, None] * E + e[None, :], mask=n_ok[:, None], other=0.0)
    at = (b * S + n)[:, None] * E + e[None, :]
    d_k = tl.load(dIndexK + at, mask=n_ok[:, None], other=0.0)
    for c0 in range(0, C, BM):
        c = c0 + tl.arange(0, BM)
        ok = c < C
        m = r0 + c
        begin = tl.load(Begin + b * N + m, mask=ok, other=0)
        end = tl.load(Rows + m, mask=ok, other=0) + S - T + 1
        visible = ok[None, :] & (n[:, None] >= begin[None, :]) & (n[:, None] < end[None, :])
        d_logits = tl.load(dLogits + (b * C + c)[None, :] * S + n[:, None], mask=visible, other=0.0)
        for j in tl.static_range(J):
            q = tl.load(IndexQ + ((b * N + m) * J + j)[:, None] * E + e[None, :], mask=ok[:, None], other=0.0)
            w = tl.load(Weight + (b * N + m) * J + j, mask=ok, other=0.0)
            gate = tl.sigmoid(tl.dot(k, tl.trans(q), input_precision="ieee") * scale + tl.load(Bias + j))
            inner = d_logits * gate * (1.0 - gate) * w[None, :] * scale
            d_k = tl.dot(inner.to(q.dtype), q, d_k, input_precision="ieee")
    tl.store(dIndexK + at, d_k, mask=n_ok[:, None])


# launch options; tests/gsa/kernels/test_triton_ahead.py checks that they spill no registers
LOGITS = {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}
QUERIES = {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2}
KEYS = {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}


def logits_options(itemsize: int) -> dict:
    """Launch options of align_logits, which reads one head after another, so that its rows fit at any width."""
    return fitted(LOGITS, 1, itemsize)


def alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows):
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    J, E = index.q.shape[2:]
    N, device = len(rows), q.device
    at = rows.int().contiguous()
    begin = torch.zeros(B, N, dtype=torch.int32, device=device)
    if doc_start is not None:
        begin = doc_start[:, rows].int().contiguous()
    q, k = q[:, rows].contiguous(), k.contiguous()
    if lse is None:
        _, lse = forward_rows(q, k, None, bits, begin, at, T, with_out=False)
    else:
        lse = lse[:, :, rows].contiguous()
    index_q, index_k = index.q[:, rows].contiguous(), index.k.contiguous()
    weight, bias = index.weight[:, rows].float().sigmoid().contiguous(), index.bias.float().contiguous()
    exact = {"dtype": torch.float32, "device": device}
    loss, d_alpha = torch.empty(B, N, **exact), torch.empty(B, N, **exact)
    d_q, d_weight, d_bias = (torch.empty(shape, **exact) for shape in ((B, N, J, E), (B, N, J), (B, N, J)))
    d_k = torch.zeros(B, S, E, **exact)
    d_logits = torch.empty(B * min(STRIP, N) * S, **exact)
    temperature = alpha.float()
    index_scale = 1 / math.sqrt(E)
    logits_tile = logits_options(q.element_size())
    queries_tile, keys_tile = (fitted(setting, E, q.element_size()) for setting in (QUERIES, KEYS))
    for r0 in range(0, N, STRIP):
        C = min(STRIP, N - r0)
        align_logits[(triton.cdiv(C, logits_tile["BM"]), B)](
            q,
            k,
            lse,
            index_q,
            index_k,
            weight,
            bias,
            temperature,
            bits,
            begin,
            at,
            loss,
            d_alpha,
            d_logits,
            r0,
            C,
            N,
            T,
            S,
            0 if bits is None else bits.shape[-1],
            1 / math.sqrt(D),
            index_scale,
            G=G,
            REP=H // G,
            D=D,
            J=J,
            E=E,
            HAS_BITS=bits is not None,
            **logits_tile,
        )
        align_queries[(triton.cdiv(C, queries_tile["BM"]), B, J)](
            index_q,
            index_k,
            weight,
            bias,
            d_logits,
            begin,
            at,
            d_q,
            d_weight,
            d_bias,
            r0,
            C,
            N,
            T,
            S,
            index_scale,
            J=J,
            E=E,
            **queries_tile,
        )
        align_keys[(triton.cdiv(S, keys_tile["BN"]), B)](
            index_q, index_k, weight, bias, d_logits, begin, at, d_k, r0, C, N, T, S, index_scale, J=J, E=E, **keys_tile
        )
    share = temperature / (B * N)
    return (
        loss.mean(),
        (d_q * share).to(index.q.dtype),
        (d_k * share).to(index.k.dtype),
        (d_weight * share).to(index.weight.dtype),
        (d_bias.sum((0, 1)) * share).to(index.bias.dtype),
        (d_alpha.sum() / (B * N)).to(alpha.dtype),
    )
