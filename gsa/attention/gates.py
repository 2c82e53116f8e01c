"""Sigmoid gates on values and outputs. Source: docs/gsa.md, 1."""

from __future__ import annotations

import torch
from torch import nn

GATE_BIAS = 0.5
"""Initial bias of a gate: it starts a little more than half open."""


class Gate(nn.Linear):
    """Multiplies `value` (B, T, width) by sigmoid(W x + b), elementwise, from the layer's input x (B, T, d)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__(d_model, width, bias=True)

    def forward(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value * torch.sigmoid(super().forward(x))
