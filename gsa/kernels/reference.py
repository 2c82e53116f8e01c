"""Every operation in plain PyTorch: the specification, in any floating dtype. Sections are those of docs/gsa.md.

The parts come first, each on whole (B, T, S) tensors; then the operations of a backend, which are composed of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gsa.kernels.operands import SelectionRule

LEVELS = 65535
"""Steps of the 16-bit fixed-point score by which keys are ordered (section 5)."""


def visible_keys(doc_start: torch.Tensor, n_keys: int | None = None) -> torch.Tensor:
    """(B, T, S) bool: whether key s is visible to query t, doc_start[t] <= s <= t (section 2).

    doc_start: (B, T) int64. The T queries are the last of the S = n_keys positions (default T).
    """
    T = doc_start.shape[1]
    s = torch.arange(T if n_keys is None else n_keys, device=doc_start.device)
    return (s <= s[-T:, None]) & (s >= doc_start[..., None])


visible = visible_keys  # its earlier name, under which others may import it


def index_scores(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The indexer's score of every key for every query (section 3).

    q: (B, T, J, E); k: (B, S, E); weight: (B, T, J), before its sigmoid; bias: (J,).
    Returns (B, T, S), between 0 and J, float32 (float64 for float64); in bfloat16 too many scores would tie.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, weight, bias = (x.to(dtype) for x in (q, k, weight, bias))
    logits = torch.einsum("btje,bse->bjts", q, k) / math.sqrt(q.shape[-1]) + bias[:, None, None]
    return torch.einsum("bjts,btj->bts", torch.sigmoid(logits), torch.sigmoid(weight))


def score_variance(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Population variance of each query's scores over its visible keys (section 4).

    scores: (B, T, S); visible: (B, T, S) bool. Returns (B, T).
    """
    n = visible.sum(-1)
    mean = torch.where(visible, scores, 0.0).sum(-1) / n
    return torch.where(visible, (scores - mean[..., None]).square(), 0.0).sum(-1) / n


def score_entropy(scores: torch.Tensor, visible: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(alpha * scores) over the visible keys (section 4).

    scores: (B, T, S); visible: (B, T, S) bool; alpha: 0-dim. Returns (B, T).
    """
    log_p = (alpha * scores).masked_fill(~visible, -torch.inf).log_softmax(-1)
    return -torch.where(visible, log_p.exp() * log_p, 0.0).sum(-1)


def keys_per_query(
    n: torch.Tensor, statistic: torch.Tensor | None, v_ref: torch.Tensor, rule: SelectionRule
) -> torch.Tensor:
    """k[t], the number of keys that each query attends to (section 4). Shape of n, int64.

    n: int64, the number of visible keys. statistic: of the shape of n, the scores' variance (mode "variance") or
    entropy ("entropy"); None in mode "off". v_ref: 0-dim, the running mean of the variance, 0 while unset.
    """
    factor = torch.ones_like(n, dtype=torch.float64 if statistic is None else statistic.dtype)
    if rule.mode == "variance":
        usual = v_ref.to(statistic.dtype)
        factor = torch.where((n > 1) & (usual > 0), 0.5 + 1 / (1 + rule.temperature * statistic / usual), factor)
    elif rule.mode == "entropy":
        factor = torch.where(n > 1, 0.5 + statistic / n.clamp_min(2).log(), factor)
    return (rule.k_base * factor).round().long().clamp(rule.k_min, rule.k_max).minimum(n)


def top_keys(scores: torch.Tensor, visible: torch.Tensor, k: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The k visible keys of highest fixed-point score of each query; ties go to the more recent key (section 5).

    scores: (B, T, S) between 0 and n_heads; visible: (B, T, S) bool; k: (B, T) int64, 1 <= k <= visible keys.
    Returns (B, T, S) bool with exactly k[t] keys in row t. The threshold (tau, cut) is one number here,
    tau * S + cut of the last key that is selected.
    """
    S = scores.shape[-1]
    level = (scores.detach() * (LEVELS / n_heads)).floor().clamp(0, LEVELS).long()
    # one integer orders by score, then by position; hidden keys come last
    order = (level * S + torch.arange(S, device=scores.device)).masked_fill(~visible, -1)
    threshold = order.sort(dim=-1, descending=True).values.gather(-1, (k - 1)[..., None])
    return order >= threshold


def attention_probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(D)) over the keys in `mask` (section 6). Returns (B, T, H, S) in float32 or float64.

    q: (B, T, H, D); k: (B, S, G, D), query head h uses key head h // (H / G); mask: (B, T, S) bool, the same
    for every head.
    """
    B, T, H, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).view(B, T, k.shape[2], -1, D)
    logits = torch.einsum("btghd,bsgd->btghs", grouped, k.to(dtype)) / math.sqrt(D)
    return logits.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(-1).view(B, T, H, -1)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention over the keys in `mask`; shapes as in `attention_probabilities`, v as k. Returns (B, T, H, D)."""
    p = attention_probabilities(q, k, mask)
    B, T, H, S = p.shape
    out = torch.einsum("btghs,bsgd->btghd", p.view(B, T, k.shape[2], -1, S), v.to(p.dtype))
    return out.reshape(q.shape).to(q.dtype)


def kl_rows(
    q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """KL(p || softmax(alpha * scores)) of each row, over the keys in its mask (section 7).

    q: (B, R, H, D), the queries of R rows; k: (B, S, G, D); scores, mask: (B, R, S); alpha: 0-dim. p is the
    attention probability averaged over heads, without gradient, so that the loss reaches only scores and alpha.
    Returns (B, R), nats.
    """
    dtype = scores.dtype
    with torch.no_grad():
        p = attention_probabilities(q, k, mask).mean(2).to(dtype)
    log_q = (alpha.to(dtype) * scores).masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(mask, torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0), 0.0).sum(-1)


def choose(
    scores: torch.Tensor,
    visible: torch.Tensor,
    alpha: torch.Tensor,
    v_ref: torch.Tensor,
    n_heads: int,
    rule: SelectionRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The selected keys (B, T, S) bool, their number (B, T) int64, and the statistic (B, T) that it follows from.

    scores, visible: (B, T, S); alpha, v_ref: 0-dim. The statistic is None in mode "off".
    """
    statistic = None
    if rule.mode == "variance":
        statistic = score_variance(scores, visible)
    elif rule.mode == "entropy":
        statistic = score_entropy(scores, visible, alpha.to(scores.dtype))
    k = keys_per_query(visible.sum(-1), statistic, v_ref, rule)
    return top_keys(scores, visible, k, n_heads), k, statistic


# -- the operations of a backend: signatures and shapes in gsa/kernels/__init__.py -----------------------


def select(index, alpha, v_ref, doc_start, rule):
    visible = visible_keys(_starts(doc_start, *index.q.shape[:2], index.q.device), index.k.shape[1])
    scores = index_scores(*index)
    mask, k, statistic = choose(scores, visible, alpha, v_ref, index.q.shape[2], rule)
    return pack(mask), k, scores.new_empty(0) if statistic is None else statistic


def attend(q, k, v, bits, doc_start):
    return masked_attention(q, k, v, _mask(bits, doc_start, q, k)), None


def alignment_kl(q, k, lse, index, alpha, bits, doc_start, rows):
    scores = index_scores(*index)[:, rows]
    mask = _mask(bits, doc_start, q, k)[:, rows]
    return kl_rows(q[:, rows], k, scores, mask, alpha).mean()


def silu_product(gate, up):
    return F.silu(gate) * up


def fold_logits(logits, targets, start, top, mass, label):
    at, here = _label_in(targets, start, logits.shape[1])
    label += torch.where(here, logits.gather(1, at[:, None])[:, 0], 0.0)
    new_top = torch.maximum(top, logits.amax(-1))
    mass.mul_((top - new_top).exp_()).add_(logits.sub_(new_top[:, None]).exp_().sum(-1))
    top.copy_(new_top)


def logits_gradient(logits, targets, start, log_z, scale, dtype):
    at, here = _label_in(targets, start, logits.shape[1])
    d_logits = logits.sub_(log_z[:, None]).exp_()
    d_logits.scatter_add_(1, at[:, None], -here[:, None].to(logits.dtype))
    return d_logits.mul_(scale[:, None]).to(dtype)


def _label_in(targets, start, width):
    """The column of each row's target in a block of the vocabulary, 0 where it is in another, and whether it is here.

    Both are (N,).
    """
    at = targets - start
    here = (at >= 0) & (at < width)
    return torch.where(here, at, 0), here


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Packs (..., S) bool into (..., ceil(S / 32)) int32: key s is bit s % 32 of word s // 32."""
    words = F.pad(mask.long(), (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32))
    value = (words << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).int()


def unpack(bits: torch.Tensor, n_keys: int) -> torch.Tensor:
    """The inverse of `pack`: (..., n_keys) bool."""
    mask = (bits[..., None] >> torch.arange(32, device=bits.device)) & 1
    return mask.flatten(-2)[..., :n_keys].bool()


def _mask(bits, doc_start, q, k):
    if bits is not None:
        return unpack(bits, k.shape[1])
    return visible_keys(_starts(doc_start, *q.shape[:2], q.device), k.shape[1])


def _starts(doc_start, B, T, device):
    return torch.zeros(B, T, dtype=torch.long, device=device) if doc_start is None else doc_start
