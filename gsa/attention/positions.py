"""What every layer of a forward pass shares: who is visible to whom, and the rotations. Source: docs/gsa.md, 1-2."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gsa import kernels
from gsa.attention.rope import rotation
from gsa.config import ModelConfig


class Positions(NamedTuple):
    """Made once per forward pass.

    seen: (B, T, T) bool, or None when every key up to the query is visible. cos, sin: (B, T, D / 2);
    indexer_cos, indexer_sin: (B, T, E / 2).
    """

    seen: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    indexer_cos: torch.Tensor
    indexer_sin: torch.Tensor


def positions(tokens: torch.Tensor, doc_start: torch.Tensor | None, config: ModelConfig) -> Positions:
    """tokens: (B, T), for its shape and device; doc_start: (B, T) int64, or None when one document fills each row."""
    B, T = tokens.shape
    place = torch.arange(T, device=tokens.device).expand(B, T)
    seen = None
    if doc_start is not None:
        place = place - doc_start
        seen = kernels.visible(doc_start)
    head = rotation(place, config.d_head, config.rope_base)
    indexer = head if config.d_indexer == config.d_head else rotation(place, config.d_indexer, config.rope_base)
    return Positions(seen, *head, *indexer)
