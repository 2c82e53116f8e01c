"""What a GSA model is: one frozen dataclass whose fields check themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ADAPTIVE_K = ("off", "variance", "entropy")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of a model. ValueError, naming the key, when a value cannot be. Source: docs/gsa.md."""

    d_model: int = _setting(512, "width of the residual stream")
    n_layers: int = _setting(8, "number of blocks")
    n_heads: int = _setting(8, "query heads (H)")
    n_kv_heads: int = _setting(2, "key/value heads (G); divides n_heads")
    d_head: int | None = _setting(None, "width of a head (D), even; default d_model / n_heads")
    d_ffn: int = _setting(1536, "hidden width of the SwiGLU feed-forward")
    vocab_size: int = _setting(32000, "entries of the embedding (V); at least the tokenizer's")
    max_position_embeddings: int = _setting(2048, "longest sequence, in tokens")
    rope_base: float = _setting(10000.0, "base of the rotary position frequencies")
    norm_eps: float = _setting(1e-5, "epsilon of RMSNorm")
    init_std: float = _setting(0.02, "standard deviation of initial weights")
    tie_embeddings: bool = _setting(True, "the output head is the embedding matrix")
    sparse: bool = _setting(True, "select keys with an indexer; off: dense attention, no indexer parameters")
    value_gate: bool = _setting(True, "sigmoid gate on values; off: absent")
    output_gate: bool = _setting(True, "sigmoid gate on the attention output; off: absent")
    d_indexer: int = _setting(64, "width of an indexer head (E), even")
    n_indexer_heads: int = _setting(4, "indexer heads (J)")
    indexer_rope: bool = _setting(True, "rotate the indexer's queries and keys by position")
    k_base: int = _setting(512, "keys per query before adaptation")
    k_min: int = _setting(128, "fewest keys per query, where so many are visible")
    k_max: int = _setting(1024, "most keys per query")
    adaptive_k: str = _setting(
        "variance", "how a query's number of keys adapts: off, variance or entropy of its scores"
    )
    adaptive_k_temperature: float = _setting(1.0, "c of adaptive_k=variance: how strongly the variance counts")

    def __post_init__(self) -> None:
        positive = (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_ffn",
            "vocab_size",
            "max_position_embeddings",
            "rope_base",
            "norm_eps",
            "init_std",
            "d_indexer",
            "n_indexer_heads",
            "k_base",
            "k_min",
            "k_max",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.n_heads % self.n_kv_heads:
            fits = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}; choose one of {fits}"
            )
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}; "
                    f"change one, or set model.d_head"
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        for name in ("d_head", "d_indexer"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must be even and positive: rotary positions turn pairs"
                )
        if not self.k_min <= self.k_base <= self.k_max:
            raise ValueError(
                f"model.k_min={self.k_min}, model.k_base={self.k_base}, model.k_max={self.k_max} "
                f"must not decrease in this order"
            )
        if self.adaptive_k not in ADAPTIVE_K:
            raise ValueError(f"model.adaptive_k={self.adaptive_k!r} is not one of {', '.join(ADAPTIVE_K)}")
        if self.adaptive_k_temperature < 0:
            raise ValueError(f"model.adaptive_k_temperature={self.adaptive_k_temperature} must not be negative")
