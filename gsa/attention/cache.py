"""The cache of decoding: keys, values and indexer keys of past tokens, in every layer. Source: docs/gsa.md, 8."""

from __future__ import annotations

import torch

from gsa.config import ModelConfig


class LayerCache:
    """The cache of one layer: k, v (B, capacity, G, D), rotated and gated; index_k (B, capacity, E), rotated."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, capacity, config.n_kv_heads, config.d_head)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.index_k = torch.empty(batch, capacity, config.d_indexer * config.sparse, dtype=dtype, device=device)

    def store(self, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores k and v (B, T, G, D) of the T tokens from position `start` on; returns those of all start + T."""
        end = start + k.shape[1]
        self.k[:, start:end], self.v[:, start:end] = k, v
        return self.k[:, :end], self.v[:, :end]

    def store_index(self, start: int, k: torch.Tensor) -> torch.Tensor:
        """Stores the indexer's keys (B, T, E) of the same tokens; returns all, (B, start + T, E)."""
        end = start + k.shape[1]
        self.index_k[:, start:end] = k
        return self.index_k[:, :end]


class Cache:
    """The caches of all layers, for `capacity` tokens of `batch` sequences; the first `length` tokens are filled.

    Raises ValueError when capacity exceeds the model's max_position_embeddings.
    """

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
                f"{config.max_position_embeddings}; make it smaller"
            )
        self.capacity, self.length = capacity, 0
        self.layers = [LayerCache(config, batch, capacity, dtype, torch.device(device)) for _ in range(config.n_layers)]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of all layers."""
        return sum(t.numel() * t.element_size() for c in self.layers for t in (c.k, c.v, c.index_k))
