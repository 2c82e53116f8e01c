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
    seen = kernels.visible(start)[:, rows]
    p = kernels.attention_probabilities(q[:1, rows], k[:1], seen).mean(2)
    attended = p
    coverage = oracle = recall = p.new_tensor(torch.nan)
    if index is not None:
        scores = kernels.index_scores(index.q[:1, rows], index.k[:1], index.weight[:1, rows], index.bias)
        mask, size, _ = selector.of_scores(scores, seen, alpha)
        best = kernels.top_keys(p / p.amax(-1, keepdim=True), seen, size, 1)
        # rows that see no more keys than they may select have nothing to get wrong
        choosing = size < seen.sum(-1)
        if choosing.any():
            coverage, oracle = (torch.where(m, p, 0.0).sum(-1)[choosing].mean() for m in (mask, best))
            recall = ((mask & best).sum(-1) / size)[choosing].mean()
        if sparse:
            attended = kernels.attention_probabilities(q[:1, rows], k[:1], mask).mean(2)
    first = attended.gather(-1, start[:, rows, None])
    saturation = [
        p.new_tensor(torch.nan) if o is None else ((o[0, rows] - 0.5).abs() > 0.5 - SATURATED).to(p.dtype).mean()
        for o in opened
    ]
    return torch.stack([coverage, oracle, recall, *saturation, first.mean()]).float()
