"""How many keys a query attends to, and the running variance that this depends on. Source: docs/gsa.md, 4."""

from __future__ import annotations

import torch
from torch import nn

from gsa import kernels
from gsa.config import ModelConfig

V_REF_DECAY = 0.99
"""Weight of the old value in an update of v_ref."""


class Selector(nn.Module):
    """Selects k[t] keys for each query by their scores.

    Its buffer v_ref, 0-dim float32 and 0 while unset, is the running mean of the score variance. Only `update_v_ref`
    changes it, after an optimizer step; a forward pass does not.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rule = kernels.SelectionRule(
            config.adaptive_k, config.adaptive_k_temperature, config.k_base, config.k_min, config.k_max
        )
        self.n_indexer_heads = config.n_indexer_heads
        self.register_buffer("v_ref", torch.zeros((), dtype=torch.float32))

    def _apply(self, fn, recurse: bool = True) -> Selector:
        # model.bfloat16() must not round a mean that moves by 1 % per step
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
        select_all: bool = False,
    ) -> kernels.Selection:
        """The selected keys. Shapes: `kernels.select`.

        select_all: select every visible key and only compute the statistic.
        """
        S = index.k.shape[1]
        rule = self.rule._replace(k_min=S, k_max=S) if select_all else self.rule
        return kernels.select(backend, index, alpha, self.v_ref, doc_start, rule)

    @torch.no_grad()
    def choose(
        self, scores: torch.Tensor, visible: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`kernels.choose` with this layer's rule, for a few rows of scores. scores, visible: (B, R, S)."""
        return kernels.choose(scores, visible, alpha, self.v_ref, self.n_indexer_heads, self.rule)

    @torch.no_grad()
    def update_v_ref(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Updates v_ref with the mean variance of one global batch, total / count, both 0-dim.

        The first batch sets v_ref to its mean; a batch with count 0 changes nothing.
        """
        mean = (total / count.clamp_min(1)).to(self.v_ref)
        moved = torch.where(self.v_ref > 0, V_REF_DECAY * self.v_ref + (1 - V_REF_DECAY) * mean, mean)
        self.v_ref.copy_(torch.where(count > 0, moved, self.v_ref))


def variance_sums(selection: kernels.Selection, doc_start: torch.Tensor | None, n_cached: int = 0) -> torch.Tensor:
    """(2,) float64: the sum of the variance over positions with more than one visible key, and their number.

    n_cached: tokens in front of these that a cache holds.
    """
    variance = selection.statistic
    place = torch.arange(n_cached, n_cached + variance.shape[1], device=variance.device)
    counted = place > (0 if doc_start is None else doc_start)
    counted = counted.expand_as(variance)
    return torch.stack([torch.where(counted, variance, 0.0).double().sum(), counted.sum().double()])
