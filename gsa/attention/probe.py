"""What a layer does, measured on a few rows: is the indexer right, do the gates still move, is there a sink."""

from __future__ import annotations

import torch

from gsa import kernels
from gsa.attention.selection import Selector

PROBES = ("coverage", "oracle", "recall", "value_saturation", "output_saturation", "first_token")
"""Names of what `probe` measures, each a share between 0 and 1, NaN where the layer has no such part.

coverage: dense attention mass, averaged over heads, that falls on the selected keys, over the rows that have to
select. oracle: the same for as many keys of largest mass. recall: share of these that were selected.
value_saturation, output_saturation: gates below 0.05 or above 0.95. first_token: attention, as the layer attends,
that falls on the first token of the document.
"""

SATURATED = 0.05

BLOCK = 128
"""Rows measured at a time: memory grows with length, not with its square."""


@torch.no_grad()
def probe(
    q: torch.Tensor,
    k: torch.Tensor,
    index: kernels.Index | None,
    selector: Selector | None,
    alpha: torch.Tensor | None,
    opened: tuple[torch.Tensor | None, torch.Tensor | None],
    doc_start: torch.Tensor | None,
    rows: torch.Tensor,
    sparse: bool,
) -> torch.Tensor:
    """(len(PROBES),) float32, over `rows` (R,) of the batch's first sequence.

    q: (B, T, H, D); k: (B, T, G, D). opened: the value and the output gate, (B, T, width). sparse: the layer
    attends to the selected keys.
    """
    start = torch.zeros_like(q[:1, :, 0, 0], dtype=torch.long) if doc_start is None else doc_start[:1]
    blocks = [_probe_rows(q, k, index, selector, alpha, start, part, sparse) for part in rows.split(BLOCK)]
    covered, best, recalled, first = (torch.cat(values) for values in zip(*blocks, strict=True))
    saturation = [
        first.new_tensor(torch.nan) if o is None else ((o[0, rows] - 0.5).abs() > 0.5 - SATURATED).to(first).mean()
        for o in opened
    ]
    return torch.stack([covered.mean(), best.mean(), recalled.mean(), *saturation, first.mean()]).float()


def _probe_rows(q, k, index, selector, alpha, start, rows, sparse) -> tuple[torch.Tensor, ...]:
    """Coverage, oracle and recall of the rows that have to select, and the first token's share of every row."""
    s = torch.arange(k.shape[1], device=k.device)
    seen = ((s <= rows[:, None]) & (s >= start[0, rows, None]))[None]
    p = kernels.attention_probabilities(q[:1, rows], k[:1], seen).mean(2)
    attended = p
    covered = oracle = recall = p.new_empty(0)
    if index is not None:
        scores = kernels.index_scores(index.q[:1, rows], index.k[:1], index.weight[:1, rows], index.bias)
        mask, size, _ = selector.of_scores(scores, seen, alpha)
        best = largest(p, seen, size)
        # rows that see no more keys than they may select have nothing to get wrong
        choosing = size < seen.sum(-1)
        covered, oracle = (torch.where(m, p, 0.0).sum(-1)[choosing] for m in (mask, best))
        recall = ((mask & best).sum(-1) / size)[choosing]
        if sparse:
            attended = kernels.attention_probabilities(q[:1, rows], k[:1], mask).mean(2)
    return covered, oracle, recall, attended.gather(-1, start[:, rows, None]).flatten()


def largest(values: torch.Tensor, seen: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """(..., S) bool: the `size` (...,) visible keys of largest value. No value is negative. Exact, whatever the spread.

    Not by `kernels.top_keys`, which ranks in steps of 1/65535: under a sink of 0.99 most of the rest would tie.
    """
    order = values.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[-1], device=order.device) < size[..., None]
    return torch.zeros_like(seen).scatter(-1, order, first)
