"""How many keys a query attends to, and the running variance it is judged by. Source: docs/gsa.md, 4."""

from __future__ import annotations

import torch
from torch import nn

from gsa import kernels
from gsa.config import ModelConfig

V_REF_DECAY = 0.99


class Selector(nn.Module):
    """Chooses k[t] and the set S[t] by the scores, and remembers what variance is usual.

    v_ref, a buffer in float32 and 0 while unset, is the running mean of the score variance. It changes only
    through `update_v_ref`, after an optimizer step: forward passes only measure.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mode, self.temperature = config.adaptive_k, config.adaptive_k_temperature
        self.k_base, self.k_min, self.k_max = config.k_base, config.k_min, config.k_max
        self.n_indexer_heads = config.n_indexer_heads
        self.register_buffer("v_ref", torch.zeros((), dtype=torch.float32))

    def _apply(self, fn, recurse: bool = True) -> Selector:
        # model.bfloat16() must not round a mean that moves by 1 % a step
        exact = self.v_ref
        super()._apply(fn, recurse)
        if not (exact.is_meta or self.v_ref.is_meta):
            self.v_ref = exact.to(self.v_ref.device)
        return self

    def forward(
        self,
        backend: kernels.Backend,
        index: kernels.Index,
        alpha: torch.Tensor,
        doc_start: torch.Tensor | None,
        everything: bool = False,
    ) -> kernels.Selection:
        """alpha: 0-dim, the indexer's temperature. everything: select all visible keys, to measure only."""
        k_min, k_max = (index.k.shape[1],) * 2 if everything else (self.k_min, self.k_max)
        return kernels.select(
            backend,
            index,
            alpha,
            self.v_ref,
            doc_start,
            mode=self.mode,
            temperature=self.temperature,
            k_base=self.k_base,
            k_min=k_min,
            k_max=k_max,
        )

    @torch.no_grad()
    def of_scores(
        self, scores: torch.Tensor, seen: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`kernels.choose` by this rule, for a few rows of scores. scores, seen: (B, R, S)."""
        return kernels.choose(
            scores,
            seen,
            alpha,
            self.v_ref,
            self.n_indexer_heads,
            self.mode,
            self.temperature,
            self.k_base,
            self.k_min,
            self.k_max,
        )

    @torch.no_grad()
    def update_v_ref(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Folds in the mean variance of one global batch; the first is taken as it is, an empty one changes nothing."""
        mean = (total / count.clamp_min(1)).to(self.v_ref)
        moved = torch.where(self.v_ref > 0, V_REF_DECAY * self.v_ref + (1 - V_REF_DECAY) * mean, mean)
        self.v_ref.copy_(torch.where(count > 0, moved, self.v_ref))


def variance_sums(selection: kernels.Selection, doc_start: torch.Tensor | None, before: int = 0) -> torch.Tensor:
    """(2,) float64: sum of the variance over positions with more than one visible key, and their count.

    before: tokens that a cache held already.
    """
    variance = selection.statistic
    place = torch.arange(before, before + variance.shape[1], device=variance.device)
    counted = place > (0 if doc_start is None else doc_start)
    counted = counted.expand_as(variance)
    return torch.stack([torch.where(counted, variance, 0.0).double().sum(), counted.sum().double()])
