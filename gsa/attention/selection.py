"""How many keys a query attends to, and the running variance it is judged by. Source: docs/gsa.md, 4."""

from __future__ import annotations

import torch
from torch import nn

from gsa import kernels
from gsa.config import ModelConfig

V_REF_DECAY = 0.99


class Selector(nn.Module):
    """Chooses k[t] from the scores, then the set S[t].

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

    @torch.no_grad()
    def forward(
        self, scores: torch.Tensor, seen: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mask (B, T, S) bool, k (B, T) int64, and variance_sums (2,) float64: see `variance_sums`.

        scores: (B, T, S); seen: (B, T, S) bool, the visible keys; alpha: 0-dim, the indexer's temperature.
        """
        n = seen.sum(-1)
        variance = kernels.score_variance(scores, seen) if self.mode == "variance" else None
        factor = self._factor(scores, seen, n, alpha, variance)
        k = (self.k_base * factor).round().long().clamp(self.k_min, self.k_max).minimum(n)
        sums = scores.new_zeros(2, dtype=torch.float64) if variance is None else variance_sums(variance, n)
        return kernels.select(scores, seen, k, self.n_indexer_heads), k, sums

    def _factor(
        self,
        scores: torch.Tensor,
        seen: torch.Tensor,
        n: torch.Tensor,
        alpha: torch.Tensor,
        variance: torch.Tensor | None,
    ) -> torch.Tensor:
        """m[t], (B, T): between 1/2 and 3/2; 1 where nothing can be said."""
        if self.mode == "off":
            return torch.ones_like(n, dtype=scores.dtype)
        if self.mode == "variance":
            v_ref = self.v_ref.to(scores.dtype)
            factor = 0.5 + 1 / (1 + self.temperature * variance / v_ref)
            return torch.where((n > 1) & (v_ref > 0), factor, 1.0)
        factor = 0.5 + kernels.score_entropy(scores, seen, alpha.to(scores.dtype)) / n.clamp_min(2).log()
        return torch.where(n > 1, factor, 1.0)

    @torch.no_grad()
    def update_v_ref(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Folds in the mean variance of one global batch; the first is taken as it is, an empty one changes nothing."""
        mean = (total / count.clamp_min(1)).to(self.v_ref)
        moved = torch.where(self.v_ref > 0, V_REF_DECAY * self.v_ref + (1 - V_REF_DECAY) * mean, mean)
        self.v_ref.copy_(torch.where(count > 0, moved, self.v_ref))


def variance_sums(variance: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """(2,) float64: sum of the variance over positions with more than one visible key, and their count."""
    counted = n > 1
    return torch.stack([torch.where(counted, variance, 0.0).double().sum(), counted.sum().double()])
