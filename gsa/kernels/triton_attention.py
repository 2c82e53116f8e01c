"""Masked flash attention in Triton, forward and backward, over selected keys given as packed bits: docs/gsa.md, 6.

The rows of a program are BM queries times the REP query heads that share a key/value head. Softmax statistics are
float32. The backward pass has one kernel for queries and one for keys and no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-1.0e30)
"""In place of -inf where a whole row of a tile may be hidden: -inf - -inf would be NaN."""


@triton.jit
def chosen_tile(Bits, row, row_ok, begin, end, n0, W, HAS_BITS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """(R, BN) bool: which of the BN keys from n0 on, a multiple of 32, each row attends to. row: (R,) rows of Bits."""
    n = n0 + tl.arange(0, BN)
    if HAS_BITS:
        w = n0 // 32 + tl.arange(0, BN // 32)
        word = tl.load(Bits + row[:, None] * W + w[None, :], mask=row_ok[:, None] & (w < W)[None, :], other=0)
        chosen = tl.reshape((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [R, BN]) != 0
    else:
        chosen = row_ok[:, None] & (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])
    return chosen


@triton.jit
def attend_forward(
    Q,
    K,
    V,
    Bits,
    Begin,
    Rows,
    Out,
    Lse,
    N,
    T,
    S,
    W,
    scale,
    G: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BITS: tl.constexpr,
    WITH_OUT: tl.constexpr,
):
    """Out (B, N, H, D) and Lse (B, H, N), to base 2, of the N queries at the ascending positions Rows (N,).

    Q (B, N, H, D); K, V (B, S, G, D); Bits (B, T, W); Begin (B, N), where the document of each query begins.
    """
    tile, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    H: tl.constexpr = G * REP
    R: tl.constexpr = BM * REP
    r = tl.arange(0, R)
    m, head = tile * BM + r // REP, g * REP + r % REP
    ok = m < N
    d = tl.arange(0, D)
    row = tl.load(Rows + m, mask=ok, other=0)
    begin, end = tl.load(Begin + b * N + m, mask=ok, other=0), row + S - T + 1
    at = ((b * N + m) * H + head)[:, None] * D + d[None, :]
    q = tl.load(Q + at, mask=ok[:, None], other=0.0)
    top = tl.full([R], FAR, dtype=tl.float32)
    mass = tl.zeros([R], dtype=tl.float32)
    out = tl.zeros([R, D], dtype=tl.float32)
    first = tl.load(Begin + b * N + tile * BM)
    last = tl.load(Rows + tl.minimum(tile * BM + BM, N) - 1) + S - T + 1
    for n0 in range(first // BN * BN, last, BN):
        n = n0 + tl.arange(0, BN)
        n_ok = n < S
        chosen = chosen_tile(Bits, b * T + row, ok, begin, end, n0, W, HAS_BITS, R, BN)
        k_t = tl.load(K + ((b * S + n) * G + g)[None, :] * D + d[:, None], mask=n_ok[None, :], other=0.0)
        s = tl.where(chosen, tl.dot(q, k_t, input_precision="ieee") * (scale * LOG2E), FAR)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.where(chosen, tl.exp2(s - new_top[:, None]), 0.0)
        fade = tl.exp2(top - new_top)
        mass = mass * fade + tl.sum(p, 1)
        if WITH_OUT:
            v = tl.load(V + ((b * S + n) * G + g)[:, None] * D + d[None, :], mask=n_ok[:, None], other=0.0)
            out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        top = new_top
    if WITH_OUT:
        tl.store(Out + at, (out / mass[:, None]).to(Out.dtype.element_ty), mask=ok[:, None])
    tl.store(Lse + (b * H + head) * N + m, top + tl.log2(mass), mask=ok)


@triton.jit
def attend_backward_queries(
    Q,
    K,
    V,
    dOut,
    Lse,
    Along,
    Bits,
    Begin,
    dQ,
    T,
    S,
    W,
    scale,
    G: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BITS: tl.constexpr,
):
    """dQ (B, T, H, D). Along (B, H, T): the sum of dOut * Out over the head width."""
    tile, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    H: tl.constexpr = G * REP
    R: tl.constexpr = BM * REP
    r = tl.arange(0, R)
    m, head = tile * BM + r // REP, g * REP + r % REP
    ok = m < T
    d = tl.arange(0, D)
    begin, end = tl.load(Begin + b * T + m, mask=ok, other=0), m + S - T + 1
    at = ((b * T + m) * H + head)[:, None] * D + d[None, :]
    q = tl.load(Q + at, mask=ok[:, None], other=0.0)
    d_out = tl.load(dOut + at, mask=ok[:, None], other=0.0)
    lse = tl.load(Lse + (b * H + head) * T + m, mask=ok, other=0.0)
    along = tl.load(Along + (b * H + head) * T + m, mask=ok, other=0.0)
    d_q = tl.zeros([R, D], dtype=tl.float32)
    first = tl.load(Begin + b * T + tile * BM)
    last = tl.minimum(tile * BM + BM, T) + S - T
    for n0 in range(first // BN * BN, last, BN):
        n = n0 + tl.arange(0, BN)
        n_ok = n < S
        chosen = chosen_tile(Bits, b * T + m, ok, begin, end, n0, W, HAS_BITS, R, BN)
        key = ((b * S + n) * G + g)[:, None] * D + d[None, :]
        k = tl.load(K + key, mask=n_ok[:, None], other=0.0)
        v = tl.load(V + key, mask=n_ok[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        p = tl.where(chosen, tl.exp2(s - lse[:, None]), 0.0)
        d_p = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        d_s = p * (d_p - along[:, None])
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision="ieee")
    tl.store(dQ + at, (d_q * scale).to(dQ.dtype.element_ty), mask=ok[:, None])


@triton.jit
def attend_backward_keys(
    Q,
    K,
    V,
    dOut,
    Lse,
    Along,
    Bits,
    Begin,
    Last,
    dK,
    dV,
    T,
    S,
    W,
    scale,
    G: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BITS: tl.constexpr,
):
    """dK, dV (B, S, G, D). Last (B, tiles): one past the last query to which a key of the tile is visible."""
    tile, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    H: tl.constexpr = G * REP
    R: tl.constexpr = BM * REP
    r = tl.arange(0, R)
    head = g * REP + r % REP
    n = tile * BN + tl.arange(0, BN)
    n_ok = n < S
    d = tl.arange(0, D)
    key = ((b * S + n) * G + g)[:, None] * D + d[None, :]
    k = tl.load(K + key, mask=n_ok[:, None], other=0.0)
    v = tl.load(V + key, mask=n_ok[:, None], other=0.0)
    d_k = tl.zeros([BN, D], dtype=tl.float32)
    d_v = tl.zeros([BN, D], dtype=tl.float32)
    first = tl.maximum(tile * BN - (S - T), 0) // BM * BM
    last = tl.load(Last + b * tl.num_programs(0) + tile)
    for m0 in range(first, last, BM):
        m = m0 + r // REP
        ok = m < T
        at = ((b * T + m) * H + head)[:, None] * D + d[None, :]
        q = tl.load(Q + at, mask=ok[:, None], other=0.0)
        d_out = tl.load(dOut + at, mask=ok[:, None], other=0.0)
        lse = tl.load(Lse + (b * H + head) * T + m, mask=ok, other=0.0)
        along = tl.load(Along + (b * H + head) * T + m, mask=ok, other=0.0)
        both = n_ok[:, None] & ok[None, :]
        if HAS_BITS:
            word = tl.load(Bits + (b * T + m)[None, :] * W + (n >> 5)[:, None], mask=both, other=0)
            chosen = ((word >> (n & 31)[:, None]) & 1) != 0
        else:
            begin = tl.load(Begin + b * T + m, mask=ok, other=0)
            chosen = both & (n[:, None] >= begin[None, :]) & (n[:, None] < (m + S - T + 1)[None, :])
        s_t = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p_t = tl.where(chosen, tl.exp2(s_t - lse[None, :]), 0.0)
        d_v = tl.dot(p_t.to(d_out.dtype), d_out, d_v, input_precision="ieee")
        d_p_t = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        d_s_t = p_t * (d_p_t - along[None, :])
        d_k = tl.dot(d_s_t.to(q.dtype), q, d_k, input_precision="ieee")
    tl.store(dK + key, (d_k * scale).to(dK.dtype.element_ty), mask=n_ok[:, None])
    tl.store(dV + key, d_v.to(dV.dtype.element_ty), mask=n_ok[:, None])


# launch options for heads of 64 in bf16, which `fitted` adapts to others; rows are those of a program, BM * REP
FORWARD = {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
BACKWARD_QUERIES = {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
BACKWARD_KEYS = {"rows": 64, "BN": 64, "num_warps": 8, "num_stages": 2}


def fitted(setting: dict, width: int, itemsize: int) -> dict:
    """Adapts a setting, made for vectors of 128 bytes (64 numbers in bf16), to wider vectors: fewer rows per program.

    Float32 is multiplied out of registers, without tensor cores, and also takes half as many keys. Up to 256 bytes
    every kernel then fits the shared memory of sm_89, in bf16 without spills: tests/gsa/kernels/test_triton_ahead.py.
    """
    rows = "rows" if "rows" in setting else "BM"
    shrunk = {rows: setting[rows] // max(1, width * itemsize // 128)}
    return setting | shrunk | ({"BN": max(32, setting["BN"] // 2)} if itemsize == 4 else {})


def tile_of(setting: dict, rep: int, width: int, itemsize: int) -> dict:
    """The launch options of a setting: its fitted `rows` become BM queries times `rep` heads of a group."""
    options = fitted(setting, width, itemsize)
    return options | {"BM": max(1, options.pop("rows") // rep), "REP": rep}


def _begins(doc_start, B, T, device):
    if doc_start is None:
        return torch.zeros(B, T, dtype=torch.int32, device=device)
    return doc_start.int().contiguous()


def forward_rows(q, k, v, bits, begin, rows, T, *, with_out):
    """The output (B, N, H, D), or None unless with_out, and the base-2 log-sum-exp (B, H, N) of N queries.

    q (B, N, H, D), the queries at the ascending positions `rows` (N,) int32 of T; begin (B, N) int32.
    """
    B, N, H, D = q.shape
    S, G = k.shape[1:3]
    out = torch.empty_like(q) if with_out else None
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    options = tile_of(FORWARD, H // G, D, q.element_size())
    attend_forward[(triton.cdiv(N, options["BM"]), B * G)](
        q,
        k,
        v,
        bits,
        begin,
        rows,
        out,
        lse,
        N,
        T,
        S,
        0 if bits is None else bits.shape[-1],
        1 / math.sqrt(D),
        G=G,
        D=D,
        HAS_BITS=bits is not None,
        WITH_OUT=with_out,
        **options,
    )
    return out, lse


class Attend(torch.autograd.Function):
    """Returns the output (B, T, H, D) and the base-2 log-sum-exp (B, H, T), which carries no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, bits, doc_start):
        q, k, v = (x.contiguous() for x in (q, k, v))
        B, T = q.shape[:2]
        begin = _begins(doc_start, B, T, q.device)
        rows = torch.arange(T, dtype=torch.int32, device=q.device)
        out, lse = forward_rows(q, k, v, bits, begin, rows, T, with_out=True)
        ctx.save_for_backward(q, k, v, out, lse, bits, begin)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, _):
        q, k, v, out, lse, bits, begin = ctx.saved_tensors
        B, T, H, D = q.shape
        S, G = k.shape[1:3]
        d_out = d_out.contiguous()
        along = (d_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = (T, S, 0 if bits is None else bits.shape[-1], 1 / math.sqrt(D))
        shared = {"G": G, "D": D, "HAS_BITS": bits is not None}
        options = tile_of(BACKWARD_QUERIES, H // G, D, q.element_size())
        attend_backward_queries[(triton.cdiv(T, options["BM"]), B * G)](
            q, k, v, d_out, lse, along, bits, begin, d_q, *sizes, **shared, **options
        )
        options = tile_of(BACKWARD_KEYS, H // G, D, q.element_size())
        tiles = triton.cdiv(S, options["BN"])
        last_key = (torch.arange(1, tiles + 1, dtype=torch.int32, device=q.device) * options["BN"] - 1).expand(B, tiles)
        # Begin never decreases: the last query that sees a key is the last whose document begins at or before it
        last = torch.searchsorted(begin, last_key.contiguous(), right=True).int()
        attend_backward_keys[(tiles, B * G)](
            q, k, v, d_out, lse, along, bits, begin, last, d_k, d_v, *sizes, **shared, **options
        )
        return d_q, d_k, d_v, None, None
