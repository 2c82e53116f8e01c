"""What every layer of a forward pass shares: who is visible to whom, and the rotations. Source: docs/gsa.md, 1-2."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gsa.attention.rope import rotation
from gsa.config import ModelConfig


class Positions(NamedTuple):
    """Made once per forward pass.

    doc_start: (B, T) int64, where the document of each query begins; None: at 0, and the positions up to the
    query are all visible. before: tokens that a cache holds already. cos, sin: (B, T, D / 2);
    indexer_cos, indexer_sin: (B, T, E / 2).
    """

    doc_start: torch.Tensor | None
    before: int
    cos: torch.Tensor
    sin: torch.Tensor
    indexer_cos: torch.Tensor
    indexer_sin: torch.Tensor


def positions(tokens: torch.Tensor, doc_start: torch.Tensor | None, config: ModelConfig, before: int = 0) -> Positions:
    """tokens: (B, T), for its shape and device; doc_start: (B, T) int64, or None when one document fills each row.

    before: how many tokens of the row a cache holds already.
    """
    B, T = tokens.shape
    place = torch.arange(before, before + T, device=tokens.device).expand(B, T)
    if doc_start is not None:
        place = place - doc_start
    head = rotation(place, config.d_head, config.rope_base)
    indexer = head if config.d_indexer == config.d_head else rotation(place, config.d_indexer, config.rope_base)
    return Positions(doc_start, before, *head, *indexer)
