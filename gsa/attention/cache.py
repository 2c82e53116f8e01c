"""What decoding keeps of past tokens: keys, values and indexer keys of every layer. Source: docs/gsa.md, 8."""

from __future__ import annotations

import torch

from gsa.config import ModelConfig


class LayerCache:
    """One layer: k, v (B, capacity, G, D), as attention reads them; index_k (B, capacity, E)."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, capacity, config.n_kv_heads, config.d_head)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.index_k = torch.empty(batch, capacity, config.d_indexer * config.sparse, dtype=dtype, device=device)

    def take(self, at: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the T tokens that begin at position `at`, and returns all (B, at + T, G, D)."""
        end = at + k.shape[1]
        self.k[:, at:end], self.v[:, at:end] = k, v
        return self.k[:, :end], self.v[:, :end]

    def take_index(self, at: int, k: torch.Tensor) -> torch.Tensor:
        """Keeps the indexer's keys (B, T, E), and returns all (B, at + T, E)."""
        end = at + k.shape[1]
        self.index_k[:, at:end] = k
        return self.index_k[:, :end]


class Cache:
    """Room for `capacity` tokens of `batch` sequences, linear in both; `length` of it is filled."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity > config.max_position_embeddings:
            raise ValueError(
                f"a cache of {capacity} tokens is more than model.max_position_embeddings="
                f"{config.max_position_embeddings}"
            )
        self.capacity, self.length = capacity, 0
        self.layers = [LayerCache(config, batch, capacity, dtype, torch.device(device)) for _ in range(config.n_layers)]

    @property
    def bytes(self) -> int:
        """Of all layers."""
        return sum(t.numel() * t.element_size() for c in self.layers for t in (c.k, c.v, c.index_k))
