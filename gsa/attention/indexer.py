"""The lightning indexer: cheap scores by which keys are selected. Source: docs/gsa.md, 3 and 7."""

from __future__ import annotations

import math

import torch
from torch import nn

from gsa import kernels
from gsa.attention.rope import rotate
from gsa.config import ModelConfig

INITIAL_ALPHA = 4.0
"""Temperature of a new indexer."""


class Indexer(nn.Module):
    """The projections from which scores are computed.

    Its input is detached, so that only its own alignment loss trains it. That loss compares attention with
    softmax(alpha * scores), where alpha = exp(log_alpha) makes up for the scores being bounded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        J, E = config.n_indexer_heads, config.d_indexer
        self.n_heads, self.width, self.use_rope = J, E, config.indexer_rope
        self.q_proj = nn.Linear(config.d_model, J * E, bias=False)
        self.k_proj = nn.Linear(config.d_model, E, bias=False)
        self.weight_proj = nn.Linear(config.d_model, J, bias=True)
        self.bias = nn.Parameter(torch.zeros(J))
        self.log_alpha = nn.Parameter(torch.tensor([math.log(INITIAL_ALPHA)]))

    @property
    def alpha(self) -> torch.Tensor:
        """The temperature, 0-dim, float32 or float64: in bfloat16 exp would be too coarse."""
        return self.log_alpha[0].to(torch.promote_types(self.log_alpha.dtype, torch.float32)).exp()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> kernels.Index:
        """x: (B, T, d), the layer's normalised input; cos, sin: (B, T, E / 2) float32, unused without indexer_rope."""
        B, T, _ = x.shape
        x = x.detach()
        q = self.q_proj(x).view(B, T, self.n_heads, self.width)
        k = self.k_proj(x).view(B, T, 1, self.width)
        if self.use_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return kernels.Index(q, k[:, :, 0], self.weight_proj(x), self.bias)
