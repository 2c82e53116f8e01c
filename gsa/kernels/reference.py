"""Every operation in plain PyTorch: the specification, in any floating dtype. Sections are docs/gsa.md's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LEVELS = 65535
"""Steps of the 16-bit fixed-point score by which keys are ordered (section 5)."""


def visible(doc_start: torch.Tensor) -> torch.Tensor:
    """(B, T, T) bool: may query t see key s: doc_start[t] <= s <= t (section 2). doc_start: (B, T) int64."""
    s = torch.arange(doc_start.shape[1], device=doc_start.device)
    return (s <= s[:, None]) & (s >= doc_start[..., None])


def index_scores(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The indexer's score of every key for every query (section 3).

    q: (B, T, J, E); k: (B, S, E); weight: (B, T, J), before its sigmoid; bias: (J,).
    Returns (B, T, S), between 0 and J, float32 (float64 for float64): in bf16 scores tie in masses.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, weight, bias = (x.to(dtype) for x in (q, k, weight, bias))
    logits = torch.einsum("btje,bse->bjts", q, k) / math.sqrt(q.shape[-1]) + bias[:, None, None]
    return torch.einsum("bjts,btj->bts", torch.sigmoid(logits), torch.sigmoid(weight))


def score_variance(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Population variance of each query's scores over its visible keys (section 4). (B, T, S) twice -> (B, T)."""
    n = seen.sum(-1)
    mean = torch.where(seen, scores, 0.0).sum(-1) / n
    return torch.where(seen, (scores - mean[..., None]).square(), 0.0).sum(-1) / n


def score_entropy(scores: torch.Tensor, seen: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(alpha * scores) over the visible keys (section 4). Returns (B, T)."""
    log_p = (alpha * scores).masked_fill(~seen, -torch.inf).log_softmax(-1)
    return -torch.where(seen, log_p.exp() * log_p, 0.0).sum(-1)


def select(scores: torch.Tensor, seen: torch.Tensor, k: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The first k visible keys of each query, by fixed-point score, ties to the more recent key (section 5).

    scores: (B, T, S) between 0 and n_heads; seen: (B, T, S) bool; k: (B, T) int64, 1 <= k <= visible keys.
    Returns (B, T, S) bool with exactly k[t] keys in row t. The threshold (tau, cut) is one number here:
    the rank key tau * S + cut of the last key that is in.
    """
    S = scores.shape[-1]
    level = (scores.detach() * (LEVELS / n_heads)).floor().clamp(0, LEVELS).long()
    # larger score first, then larger position: one integer orders both; hidden keys come last
    order = (level * S + torch.arange(S, device=scores.device)).masked_fill(~seen, -1)
    threshold = order.sort(dim=-1, descending=True).values.gather(-1, (k - 1)[..., None])
    return order >= threshold


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention, scale 1/sqrt(D), over the keys in `mask`, or causal when it is None (section 6).

    q: (B, T, H, D); k, v: (B, T, G, D), query head h uses key/value head h // (H / G); mask: (B, T, T) bool,
    the same for every head. Returns (B, T, H, D).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


def alignment_kl(
    q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """KL(p || softmax(alpha * scores)) of each given row, over the keys in its mask (section 7).

    q: (B, R, H, D) the queries of R rows; k: (B, S, G, D); scores, mask: (B, R, S); alpha: 0-dim.
    p is the attention probability averaged over heads; it carries no gradient, so the loss reaches only
    scores and alpha. Returns (B, R) nats.
    """
    dtype = scores.dtype
    with torch.no_grad():
        B, R, H, D = q.shape
        grouped = q.to(dtype).view(B, R, k.shape[2], -1, D)
        logits = torch.einsum("brghd,bsgd->brghs", grouped, k.to(dtype)) / math.sqrt(D)
        p = logits.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(-1).mean((2, 3))
    log_q = (alpha.to(dtype) * scores).masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(mask, torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0), 0.0).sum(-1)
