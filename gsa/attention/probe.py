"""Measures a layer on a few rows: indexer quality, gate saturation, and attention to the first token."""

from __future__ import annotations

import torch

from gsa import kernels
from gsa.attention.selection import Selector

PROBES = ("coverage", "oracle", "recall", "value_saturation", "output_saturation", "first_token")
"""The measures that `probe` returns, each a share between 0 and 1; NaN where the layer lacks the part.

coverage: dense attention mass, averaged over heads, on the selected keys; mean over the rows that see more keys than
they select. oracle: the same for equally many keys of largest mass. recall: share of the oracle's keys that are
selected. value_saturation, output_saturation: gate elements below 0.05 or above 0.95. first_token: attention mass, in
the stage that the layer is in, on the first token of the document.
"""

SATURATED = 0.05
"""A gate element this close to 0 or 1 is saturated."""

BLOCK = 128
"""Rows measured at a time, so that memory grows with the length and not with its square."""


@torch.no_grad()
def probe(
    q: torch.Tensor,
    k: torch.Tensor,
    index: kernels.Index | None,
    selector: Selector | None,
    alpha: torch.Tensor | None,
    gates: tuple[torch.Tensor | None, torch.Tensor | None],
    doc_start: torch.Tensor | None,
    rows: torch.Tensor,
    sparse: bool,
) -> torch.Tensor:
    """The measures of PROBES, (len(PROBES),) float32, over the positions `rows` (R,) of the batch's first sequence.

    q: (B, T, H, D); k: (B, T, G, D). index, selector, alpha: None in a dense layer. gates: outputs of the value and
    the output gate, (B, T, width), each None where absent. sparse: whether the layer attends to selected keys only.
    """
    start = torch.zeros_like(q[:1, :, 0, 0], dtype=torch.long) if doc_start is None else doc_start[:1]
    blocks = [_probe_rows(q, k, index, selector, alpha, start, part, sparse) for part in rows.split(BLOCK)]
    covered, best, recalled, first = (torch.cat(values) for values in zip(*blocks, strict=True))
    saturation = [
        first.new_tensor(torch.nan) if g is None else ((g[0, rows] - 0.5).abs() > 0.5 - SATURATED).to(first).mean()
        for g in gates
    ]
    return torch.stack([covered.mean(), best.mean(), recalled.mean(), *saturation, first.mean()]).float()


def _probe_rows(q, k, index, selector, alpha, start, rows, sparse) -> tuple[torch.Tensor, ...]:
    """Coverage, oracle and recall of the rows that do not select all they see; the first token's share of all rows."""
    s = torch.arange(k.shape[1], device=k.device)
    visible = ((s <= rows[:, None]) & (s >= start[0, rows, None]))[None]
    p = kernels.attention_probabilities(q[:1, rows], k[:1], visible).mean(2)
    attended = p
    covered = oracle = recall = p.new_empty(0)
    if index is not None:
        scores = kernels.index_scores(index.q[:1, rows], index.k[:1], index.weight[:1, rows], index.bias)
        mask, size, _ = selector.choose(scores, visible, alpha)
        best = largest(p, visible, size)
        # a row that selects all its visible keys cannot select wrong ones
        choosing = size < visible.sum(-1)
        covered, oracle = (torch.where(m, p, 0.0).sum(-1)[choosing] for m in (mask, best))
        recall = ((mask & best).sum(-1) / size)[choosing]
        if sparse:
            attended = kernels.attention_probabilities(q[:1, rows], k[:1], mask).mean(2)
    return covered, oracle, recall, attended.gather(-1, start[:, rows, None]).flatten()


def largest(values: torch.Tensor, visible: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """(..., S) bool: the `size` visible keys of largest value.

    values: (..., S), not negative; visible: (..., S) bool; size: (...,) int64. `kernels.top_keys` would not do: it
    ranks in steps of 1/65535, and where one key has 0.99 of the mass, most of the others would tie.
    """
    order = values.masked_fill(~visible, -1.0).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[-1], device=order.device) < size[..., None]
    return torch.zeros_like(visible).scatter(-1, order, first)
