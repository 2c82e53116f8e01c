"""What all layers of a forward pass share: where documents begin, and the rotations. Source: docs/gsa.md, 1 and 2."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gsa.attention.rope import rotation
from gsa.config import ModelConfig


class Positions(NamedTuple):
    """Computed once per forward pass.

    doc_start: (B, T) int64, the position at which the document of each query begins; None: one document fills each
    row. n_cached: tokens in front of these that a cache already holds. cos, sin: (B, T, D / 2) float32; indexer_cos,
    indexer_sin: (B, T, E / 2) float32.
    """

    doc_start: torch.Tensor | None
    n_cached: int
    cos: torch.Tensor
    sin: torch.Tensor
    indexer_cos: torch.Tensor
    indexer_sin: torch.Tensor


def make_positions(
    tokens: torch.Tensor, doc_start: torch.Tensor | None, config: ModelConfig, n_cached: int = 0
) -> Positions:
    """The positions of `tokens` (B, T), whose values are not read; doc_start and n_cached as in Positions."""
    B, T = tokens.shape
    place = torch.arange(n_cached, n_cached + T, device=tokens.device).expand(B, T)
    if doc_start is not None:
        place = place - doc_start
    head = rotation(place, config.d_head, config.rope_base)
    indexer = head if config.d_indexer == config.d_head else rotation(place, config.d_indexer, config.rope_base)
    return Positions(doc_start, n_cached, *head, *indexer)


positions = make_positions  # its earlier name, under which others may import it
