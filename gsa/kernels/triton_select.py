"""Selection of keys in Triton: docs/gsa.md, 3 to 5.

For one strip of queries at a time, three kernels compute the scores as 16-bit levels, the statistic that k follows
from, and by a radix select the k largest levels of each row, which are written once as packed bits. A strip of 512
queries stays in the L2 cache of most GPUs: scores are computed once and read four times.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gsa.kernels.reference import LEVELS, keys_per_query
from gsa.kernels.triton_attention import fitted

STRIP = 512
"""Queries whose levels exist at the same time."""


@triton.jit
def index_tile(
    Q, W, Bias, k_t, row, row_ok, scale, J: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Scores (BM, BN) float32. Q (rows, J, E); W (rows, J), after its sigmoid; k_t (E, BN); row (BM,) int64."""
    e = tl.arange(0, E)
    score = tl.zeros([BM, BN], dtype=tl.float32)
    for j in tl.static_range(J):
        q = tl.load(Q + (row * J + j)[:, None] * E + e[None, :], mask=row_ok[:, None], other=0.0)
        w = tl.load(W + row * J + j, mask=row_ok, other=0.0)
        x = tl.dot(q, k_t, input_precision="ieee") * scale + tl.load(Bias + j)
        score += w[:, None] * tl.sigmoid(x)
    return score


@triton.jit
def level_strip(
    Q,
    K,
    W,
    Bias,
    Strip,
    q0,
    C,
    T,
    S,
    scale,
    to_level,
    J: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Writes Strip (B, C, S) uint16, the levels of the C queries from q0 on, except tiles without a visible key."""
    first_n, first_m, b = tl.program_id(0) * BN, tl.program_id(1) * BM, tl.program_id(2).to(tl.int64)
    if first_n <= q0 + first_m + BM - 1 + S - T:
        n, m = first_n + tl.arange(0, BN), first_m + tl.arange(0, BM)
        n_ok, m_ok = n < S, m < C
        k_t = tl.load(K + (b * S + n)[None, :] * E + tl.arange(0, E)[:, None], mask=n_ok[None, :], other=0.0)
        score = index_tile(Q, W, Bias, k_t, b * T + q0 + m, m_ok, scale, J, E, BM, BN)
        level = tl.minimum((score * to_level).to(tl.int32), 65535)
        at = Strip + (b * C + m)[:, None] * S + n[None, :]
        tl.store(at, level.to(tl.uint16), mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def row_statistic(Strip, Start, Alpha, Out, q0, C, T, S, to_score, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Out (B, C) float32: variance of a row's scores I over its visible keys, or entropy of softmax(alpha * I)."""
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(Start + b * T + q0 + r)
    end = q0 + r + S - T + 1
    base = Strip + (b * C + r) * S
    o = tl.arange(0, BLOCK)
    low = start // BLOCK * BLOCK
    if ENTROPY:
        alpha = tl.load(Alpha)
        top = 0.0
        for s0 in range(low, end, BLOCK):
            s = s0 + o
            ok = (s >= start) & (s < end)
            level = tl.load(base + s, mask=ok, other=0).to(tl.int32).to(tl.float32)
            top = tl.maximum(top, tl.max(level, 0))
        mass = 0.0
        energy = 0.0
        for s0 in range(low, end, BLOCK):
            s = s0 + o
            ok = (s >= start) & (s < end)
            level = tl.load(base + s, mask=ok, other=0).to(tl.int32).to(tl.float32)
            x = (level - top) * to_score * alpha
            weight = tl.where(ok, tl.exp(x), 0.0)
            mass += tl.sum(weight, 0)
            energy += tl.sum(weight * x, 0)
        tl.store(Out + b * C + r, tl.log(mass) - energy / mass)
    else:
        total = 0.0
        for s0 in range(low, end, BLOCK):
            s = s0 + o
            ok = (s >= start) & (s < end)
            total += tl.sum(tl.load(base + s, mask=ok, other=0).to(tl.int32).to(tl.float32), 0)
        mean = total / (end - start)
        square = 0.0
        for s0 in range(low, end, BLOCK):
            s = s0 + o
            ok = (s >= start) & (s < end)
            x = tl.load(base + s, mask=ok, other=0).to(tl.int32).to(tl.float32) - mean
            square += tl.sum(tl.where(ok, x * x, 0.0), 0)
        tl.store(Out + b * C + r, square * to_score * to_score / (end - start))


@triton.jit
def select_rows(Strip, Start, Wanted, Bits, q0, C, T, S, W, BLOCK: tl.constexpr):
    """Writes Bits (B, T, W) of the strip's rows: the Wanted[b, r] visible keys of highest level, recent ones first.

    Two passes of a radix select find tau, the level of the last selected key. A pass from the most recent key to the
    oldest then selects every key above tau, and as many keys at tau as are still wanted.
    """
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(Start + b * T + q0 + r)
    wanted = tl.load(Wanted + b * C + r)
    end = q0 + r + S - T + 1
    base = Strip + (b * C + r) * S
    o = tl.arange(0, BLOCK)
    digit = tl.arange(0, 256)
    low = start // BLOCK * BLOCK

    high = tl.zeros([256], dtype=tl.int32)
    for s0 in range(low, end, BLOCK):
        s = s0 + o
        ok = (s >= start) & (s < end)
        level = tl.load(base + s, mask=ok, other=0).to(tl.int32)
        high += tl.histogram(level >> 8, 256, mask=ok)
    tau_high = tl.max(tl.where(tl.cumsum(high, 0, reverse=True) >= wanted, digit, 0), 0)
    left = wanted - tl.sum(tl.where(digit > tau_high, high, 0), 0)

    fine = tl.zeros([256], dtype=tl.int32)
    for s0 in range(low, end, BLOCK):
        s = s0 + o
        ok = (s >= start) & (s < end)
        level = tl.load(base + s, mask=ok, other=0).to(tl.int32)
        fine += tl.histogram(level & 255, 256, mask=ok & ((level >> 8) == tau_high))
    tau_low = tl.max(tl.where(tl.cumsum(fine, 0, reverse=True) >= left, digit, 0), 0)
    ties = left - tl.sum(tl.where(digit > tau_low, fine, 0), 0)
    tau = tau_high * 256 + tau_low

    met = 0
    blocks = (S + BLOCK - 1) // BLOCK
    for i in range(0, blocks):
        block = blocks - 1 - i
        s = block * BLOCK + o
        ok = (s >= start) & (s < end)
        level = tl.load(base + s, mask=ok, other=0).to(tl.int32)
        equal = (ok & (level == tau)).to(tl.int32)
        rank = met + tl.cumsum(equal, 0, reverse=True)  # 1 for the most recent
        inside = ok & ((level > tau) | ((equal == 1) & (rank <= ties)))
        met += tl.sum(equal, 0)
        words = tl.sum(tl.reshape(inside.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :], 1)
        w = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        tl.store(Bits + (b * T + q0 + r) * W + w, words, mask=w < W)


def select(index, alpha, v_ref, doc_start, rule):
    B, T, J, E = index.q.shape
    S, device = index.k.shape[1], index.q.device
    W = -(-S // 32)
    begin = torch.zeros(B, T, dtype=torch.int32, device=device) if doc_start is None else doc_start.int().contiguous()
    n = torch.arange(S - T + 1, S + 1, device=device) - begin
    none = torch.empty(0, dtype=torch.float32, device=device)
    select_all = rule.k_min >= S
    if rule.mode == "off" and select_all:
        return torch.empty(B, T, 0, dtype=torch.int32, device=device), n.long(), none
    q, keys = index.q.contiguous(), index.k.contiguous()
    weight, bias = index.weight.float().sigmoid().contiguous(), index.bias.float().contiguous()
    alpha = alpha.float()
    bits = torch.empty(B, T, 0 if select_all else W, dtype=torch.int32, device=device)
    k = torch.empty(B, T, dtype=torch.int64, device=device)
    statistic = none if rule.mode == "off" else torch.empty(B, T, dtype=torch.float32, device=device)
    levels = torch.empty(B * min(STRIP, T) * S, dtype=torch.uint16, device=device)
    block, tile = block_of(S), fitted(SCORE, E, q.element_size())
    for q0 in range(0, T, STRIP):
        C = min(STRIP, T - q0)
        rows = slice(q0, q0 + C)
        grid = (triton.cdiv(S, tile["BN"]), triton.cdiv(C, tile["BM"]), B)
        level_strip[grid](q, keys, weight, bias, levels, q0, C, T, S, 1 / math.sqrt(E), LEVELS / J, J=J, E=E, **tile)
        found = None
        if rule.mode != "off":
            found = torch.empty(B, C, dtype=torch.float32, device=device)
            row_statistic[(C, B)](
                levels,
                begin,
                alpha,
                found,
                q0,
                C,
                T,
                S,
                J / LEVELS,
                ENTROPY=rule.mode == "entropy",
                BLOCK=block,
                num_warps=8,
            )
            statistic[:, rows] = found
        k[:, rows] = keys_per_query(n[:, rows], found, v_ref, rule)
        if select_all:
            continue
        wanted = k[:, rows].int().contiguous()
        select_rows[(C, B)](levels, begin, wanted, bits, q0, C, T, S, W, BLOCK=block, num_warps=8)
    return bits, k, statistic


SCORE = {"BM": 64, "BN": 64, "num_warps": 8}


def block_of(S: int) -> int:
    """How many keys the program of a row reads at a time: a power of two, at least one word of bits."""
    return max(32, min(2048, triton.next_power_of_2(S)))
