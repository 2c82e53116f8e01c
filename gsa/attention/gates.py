"""Sigmoid gates on values and outputs. Source: docs/gsa.md, 1."""

from __future__ import annotations

import torch
from torch import nn

GATE_BIAS = 0.5
"""Initial bias of a gate, so that it starts slightly more than half open."""


class Gate(nn.Linear):
    """sigmoid(W x + b), (B, T, width), for the layer's input x (B, T, d); the caller multiplies by it, elementwise."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__(d_model, width, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(super().forward(x))
