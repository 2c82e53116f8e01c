"""Rotary positions. Source: docs/gsa.md, 1."""

from __future__ import annotations

import torch


def rotation(positions: torch.Tensor, width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, each (B, T, width / 2) float32, for integer positions (B, T).

    They are computed in float64 and rounded once: in float32 an angle at position 100,000 is off by 0.004.
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angles = positions[..., None].double() * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin].

    x: (B, T, heads, width); cos, sin: (B, T, width / 2). Returns the shape and dtype of x.
    """
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
