"""The operations in PyTorch, on any device, one chunk of queries at a time: no (T, S) float tensor outlives a chunk.

Signatures and shapes are those of gsa/kernels/__init__.py. The selected set is computed once, as packed bits, and
read by attention, by its backward pass and by the alignment loss. Attention folds the query heads that share a
key/value head into the rows of one masked flash attention, whose output and log-sum-exp are all that the backward
pass needs; this was the fastest form measured (benchmarks/results/attention_cpu.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsa.kernels.reference import LEVELS, keys_per_query

CHUNK = 128
"""Queries of a chunk. From 64 to 512 the time is the same within 10 %; memory grows with the chunk."""


class _Chunk(NamedTuple):
    """Queries `rows`, the range `keys` of keys that they can see, and which of these are visible to each.

    visible: (B, C, keys) bool, or (1, C, keys) without documents.
    """

    rows: Tensor | slice
    keys: slice
    visible: Tensor


def _chunks(
    n_queries: int, n_keys: int, doc_start: Tensor | None, rows: Tensor | None = None, *, device: torch.device
) -> Iterator[_Chunk]:
    """Chunks of all queries, or of the ascending `rows`. A range of keys begins at a multiple of 32, a word of bits."""
    cached = n_keys - n_queries
    for start in range(0, n_queries if rows is None else len(rows), CHUNK):
        if rows is None:
            part: Tensor | slice = slice(start, min(start + CHUNK, n_queries))
            at = torch.arange(part.start, part.stop, device=device)
        else:
            part = at = rows[start : start + CHUNK]
        last = int(at[-1]) + cached + 1
        begins = None if doc_start is None else doc_start[:, part]
        first = 0 if begins is None else int(begins.min()) // 32 * 32
        keys = slice(first, last)
        s = torch.arange(first, last, device=device)
        visible = (s <= at[:, None] + cached)[None]
        if begins is not None:
            visible = visible & (s >= begins[..., None])
        yield _Chunk(part, keys, visible)


# -- scores and selection -------------------------------------------------------------------------------


def _gates(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(q k / sqrt(E) + bias), (B, J, C, S), in float32 or float64. q: (B, C, J, E); k: (B, S, E)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, C, J, E = q.shape
    rows = (q.to(dtype) / math.sqrt(E)).transpose(1, 2).reshape(B, J * C, E)
    offset = bias.to(dtype).repeat_interleave(C)[:, None]
    return torch.baddbmm(offset, rows, k.to(dtype).transpose(1, 2)).sigmoid_().view(B, J, C, -1)


def _scores(gates: Tensor, weight: Tensor) -> Tensor:
    """The scores (B, C, S). gates: (B, J, C, S); weight: (B, C, J), after its sigmoid."""
    out = gates[:, 0] * weight[..., 0, None]
    for j in range(1, gates.shape[1]):
        out.addcmul_(gates[:, j], weight[..., j, None])
    return out


def select(index, alpha, v_ref, doc_start, rule):
    B, T, J, _ = index.q.shape
    S, device = index.k.shape[1], index.q.device
    dtype = torch.promote_types(index.q.dtype, torch.float32)
    n = _count_visible(B, T, S, doc_start, device)
    select_all = rule.k_min >= S
    if rule.mode == "off" and select_all:
        return torch.empty(B, T, 0, dtype=torch.int32, device=device), n, torch.empty(0, dtype=dtype, device=device)
    bits = torch.zeros(B, T, 0 if select_all else -(-S // 32), dtype=torch.int32, device=device)
    k = torch.empty_like(n)
    statistic = torch.empty(0 if rule.mode == "off" else (B, T), dtype=dtype, device=device)
    weight = index.weight.to(dtype).sigmoid()
    for rows, keys, visible in _chunks(T, S, doc_start, device=device):
        scores = _scores(_gates(index.q[:, rows], index.k[:, keys], index.bias), weight[:, rows])
        visible = visible.expand_as(scores)
        if rule.mode == "variance":
            statistic[:, rows] = _variance(scores, visible, n[:, rows])
        elif rule.mode == "entropy":
            statistic[:, rows] = _entropy(scores, visible, alpha.to(dtype))
        k[:, rows] = keys_per_query(n[:, rows], None if rule.mode == "off" else statistic[:, rows], v_ref, rule)
        if select_all:
            continue
        chosen = _top_keys(scores, visible, k[:, rows], n[:, rows], J)
        words = _pack(chosen)
        first = keys.start // 32
        bits[:, rows, first : first + words.shape[-1]] = words
    if not select_all and torch.equal(k, n):
        bits = bits.new_empty(B, T, 0)
    return bits, k, statistic


def _count_visible(B: int, T: int, S: int, doc_start: Tensor | None, device: torch.device) -> Tensor:
    """(B, T) int64, the number of visible keys of each query."""
    end = torch.arange(S - T + 1, S + 1, device=device)
    return end.expand(B, T).contiguous() if doc_start is None else end - doc_start


def _variance(scores: Tensor, visible: Tensor, n: Tensor) -> Tensor:
    mean = scores.masked_fill(~visible, 0.0).sum(-1) / n
    return (scores - mean[..., None]).masked_fill_(~visible, 0.0).square_().sum(-1) / n


def _entropy(scores: Tensor, visible: Tensor, alpha: Tensor) -> Tensor:
    log_p = (alpha * scores).masked_fill_(~visible, -torch.inf).log_softmax(-1)
    return -(log_p.exp() * log_p).masked_fill_(~visible, 0.0).sum(-1)


def _top_keys(scores: Tensor, visible: Tensor, k: Tensor, n: Tensor, n_heads: int) -> Tensor:
    """(B, C, S) bool: the k visible keys of highest fixed-point score; ties go to the more recent key."""
    if torch.equal(k, n):
        return visible
    S = scores.shape[-1]
    integer = torch.int32 if (LEVELS + 1) * S < 2**31 else torch.int64
    level = (scores * (LEVELS / n_heads)).floor_().clamp_(0, LEVELS).to(integer)
    order = (level * S).add_(torch.arange(S, dtype=integer, device=scores.device)).masked_fill_(~visible, -1)
    threshold = _sorted(order).gather(-1, (S - k)[..., None])
    return order >= threshold


def _sorted(order: Tensor) -> Tensor:
    # numpy's vectorised integer sort is nine times as fast as torch's on a CPU
    return torch.from_numpy(np.sort(order.numpy())) if order.device.type == "cpu" else order.sort().values


def _pack(mask: Tensor) -> Tensor:
    """`reference.pack`, eight keys at a time: a product gathers the low bits of eight bytes in the highest byte."""
    octets = F.pad(mask.view(torch.uint8), (0, -mask.shape[-1] % 32)).contiguous().view(torch.int64)
    return ((octets * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)


def _unpack(bits: Tensor, chunk: _Chunk) -> Tensor:
    """(B, C, keys) bool: the part of `bits` for the queries and keys of a chunk."""
    words = bits[:, chunk.rows, chunk.keys.start // 32 : -(-chunk.keys.stop // 32)]
    octets = words.contiguous().view(torch.uint8).int()
    table = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64)[:, 0]
    mask = table.to(bits.device).index_select(0, octets.flatten()).view(torch.bool)
    return mask.view(*words.shape[:2], -1)[..., : chunk.keys.stop - chunk.keys.start]


# -- attention ------------------------------------------------------------------------------------------


def attend(q, k, v, bits, doc_start):
    if bits is None and doc_start is None and q.shape[1] in (1, k.shape[1]):
        causal = q.shape[1] > 1  # one query sees every key
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2), None
    return _Attend.apply(q, k, v, bits, doc_start), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bits, doc_start):
        G = k.shape[2]
        forward = _flash if q.device.type == "cpu" else _explicit
        keys, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        out = torch.empty_like(q)
        lses = []
        for chunk in _chunks(q.shape[1], k.shape[1], doc_start, device=q.device):
            mask = chunk.visible if bits is None else _unpack(bits, chunk)
            part, lse = forward(
                _fold(q[:, chunk.rows], G), keys[:, :, chunk.keys], values[:, :, chunk.keys], _additive(mask, q, G)
            )
            out[:, chunk.rows] = _unfold(part, q.shape[2])
            lses.append(lse)
        ctx.save_for_backward(keys, values, q, out, bits, doc_start, *lses)
        return out

    @staticmethod
    def backward(ctx, d_out):
        keys, values, q, out, bits, doc_start, *lses = ctx.saved_tensors
        G, S = keys.shape[1:3]
        backward = _flash_backward if q.device.type == "cpu" else _explicit_backward
        d_q = torch.empty_like(q)
        exact = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (keys, values))
        for chunk, lse in zip(_chunks(q.shape[1], S, doc_start, device=q.device), lses, strict=True):
            mask = chunk.visible if bits is None else _unpack(bits, chunk)
            d_q_part, d_k_part, d_v_part = backward(
                _fold(d_out[:, chunk.rows], G),
                _fold(q[:, chunk.rows], G),
                keys[:, :, chunk.keys],
                values[:, :, chunk.keys],
                _fold(out[:, chunk.rows], G),
                lse,
                _additive(mask, q, G),
            )
            d_q[:, chunk.rows] = _unfold(d_q_part, q.shape[2])
            d_k[:, :, chunk.keys] += d_k_part
            d_v[:, :, chunk.keys] += d_v_part
        return d_q, d_k.transpose(1, 2).to(q.dtype), d_v.transpose(1, 2).to(q.dtype), None, None


def _fold(x: Tensor, G: int) -> Tensor:
    """(B, C, H, D) to (B, G, H / G * C, D): the query heads that share a key/value head become rows."""
    B, C, H, D = x.shape
    return x.view(B, C, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, -1, D)


def _unfold(x: Tensor, H: int) -> Tensor:
    """The inverse of `_fold`."""
    B, G, rows, D = x.shape
    return x.view(B, G, H // G, -1, D).permute(0, 3, 1, 2, 4).reshape(B, -1, H, D)


def _additive(mask: Tensor, q: Tensor, G: int) -> Tensor:
    """0 where `mask` is true and -inf elsewhere, for the folded rows: (B or 1, 1, H / G * C, keys)."""
    zero = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    return zero.masked_fill_(~mask, -torch.inf).repeat(1, q.shape[2] // G, 1)[:, None]


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of F.scaled_dot_product_attention on a CPU, which also returns the log-sum-exp."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)


def _flash_backward(d_out, q, k, v, out, lse, mask):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, False, attn_mask=mask
    )


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1]) + mask
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp_().to(v.dtype) @ v, lse


def _explicit_backward(d_out, q, k, v, out, lse, mask):
    scale = 1 / math.sqrt(q.shape[-1])
    p = ((q @ k.transpose(-1, -2)).to(lse.dtype) * scale + mask - lse[..., None]).exp_()
    d_v = p.to(v.dtype).transpose(-1, -2) @ d_out
    along = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    d_logits = (p * ((d_out @ v.transpose(-1, -2)).to(lse.dtype) - along) * scale).to(q.dtype)
    return d_logits @ k, d_logits.transpose(-1, -2) @ q, d_v


# -- the alignment loss ---------------------------------------------------------------------------------


def alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows):
    B, T, H, D = q.shape
    S, J = k.shape[1], index.q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    alpha = alpha.to(dtype)
    scale = 1 / math.sqrt(index.q.shape[-1])
    keys = k.transpose(1, 2).to(dtype)
    weight = index.weight[:, rows].to(dtype).sigmoid()
    index_k = index.k.to(dtype)
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    d_alpha = torch.zeros((), dtype=dtype, device=q.device)
    d_q = torch.empty(B, len(rows), *index.q.shape[2:], dtype=dtype, device=q.device)
    d_k = torch.zeros_like(index_k)
    d_weight = torch.empty_like(weight)
    d_bias = torch.zeros(J, dtype=dtype, device=q.device)
    done = 0
    for chunk in _chunks(T, S, doc_start, rows, device=q.device):
        here = slice(done, done + len(chunk.rows))
        done = here.stop
        mask = chunk.visible if bits is None else _unpack(bits, chunk)
        index_q = index.q[:, chunk.rows].to(dtype)
        gates = _gates(index_q, index_k[:, chunk.keys], index.bias)
        scores = _scores(gates, weight[:, here])
        p = _probabilities(q[:, chunk.rows].to(dtype), keys[:, :, chunk.keys], mask)
        log_q = (alpha * scores).masked_fill_(~mask, -torch.inf).log_softmax(-1)
        loss += (torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0)).sum(dtype=torch.float64)
        # gradient of the loss by alpha * scores; 0 outside the mask, where both terms are 0
        d_logits = log_q.exp_().sub_(p).div_(B * len(rows))
        d_alpha += (d_logits * scores).sum()
        d_scores = d_logits.mul_(alpha)
        for j in range(J):
            gate = gates[:, j]
            weighted = d_scores * gate
            w = weight[:, here, j]
            d_weight[:, here, j] = weighted.sum(-1) * w * (1 - w)
            inner = weighted.mul_(1 - gate).mul_(w[..., None])
            d_bias[j] += inner.sum()
            inner *= scale
            d_q[:, here, j] = inner @ index_k[:, chunk.keys]
            d_k[:, chunk.keys] += inner.transpose(1, 2) @ index_q[:, :, j]
    gradients = (d_q, d_k, d_weight, d_bias, d_alpha)
    types = (index.q, index.k, index.weight, index.bias, alpha)
    return (loss / (B * len(rows))).to(dtype), *(g.to(x.dtype) for g, x in zip(gradients, types, strict=True))


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) over the mask, averaged over heads: (B, C, keys).

    q: (B, C, H, D); k: (B, G, keys, D).
    """
    B, C, H, D = q.shape
    G = k.shape[1]
    folded = (_fold(q, G) / math.sqrt(D)) @ k.transpose(-1, -2)
    logits = folded.view(B, H, C, -1).masked_fill_(~mask[:, None], -torch.inf)
    return logits.softmax(-1).mean(1)


# -- feed-forward ---------------------------------------------------------------------------------------


def silu_product(gate, up):
    return _SiluProduct.apply(gate, up)


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate) * d_out
        return torch.ops.aten.silu_backward(d_out * up, gate), d_up
