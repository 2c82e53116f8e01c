"""The configuration of a GSA model: one frozen dataclass whose fields check themselves.

training/config/schema.py uses `key` and `check_keys` too, for the configuration of a run.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Effect = Literal["harmless", "rounding", "curve", "impossible"]
"""What changing a key on resume does: no number changes; numbers may differ in their last digits, which a long run
amplifies; the loss curve changes; the saved tensors no longer fit."""


def key(
    default: Any = MISSING,
    meaning: str = "",
    *,
    resume: Effect,
    factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A configuration key: its default, meaning with unit, effect of a change on resume, and bounds if it is a number.

    The type lists the choices, as a Literal. None is allowed where the type allows it, whatever the bounds.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    known = {words: limit for words, limit in bounds.items() if limit is not None}
    return field(
        default=default, default_factory=factory, metadata={"meaning": meaning, "resume": resume, "bounds": known}
    )


def choices(hint: Any) -> tuple[str, ...]:
    """The values that a key of this type may have; empty unless the type is a Literal."""
    return get_args(hint) if get_origin(hint) is Literal else ()


LARGEST = 2**63 - 1
"""The largest int64."""


def check_keys(cfg: Any, section: str) -> None:
    """Checks each field of a dataclass of keys against its choices and bounds. Raises ValueError naming section.key."""
    hints = get_type_hints(type(cfg))
    for f in fields(cfg):
        value, allowed = getattr(cfg, f.name), choices(hints[f.name])
        if allowed and value not in allowed:
            raise ValueError(f"{section}.{f.name}={value!r} is not one of {', '.join(allowed)}")
        if value is None:
            if type(None) not in get_args(hints[f.name]):
                raise ValueError(f"{section}.{f.name} must have a value, not null")
            continue
        if value == "":
            other = ", or null" if type(None) in get_args(hints[f.name]) else ""
            raise ValueError(f"{section}.{f.name} is empty; give a value{other}")
        if isinstance(value, int) and value > LARGEST and "at most" not in f.metadata["bounds"]:
            raise ValueError(f"{section}.{f.name}={value} must be at most {LARGEST}, what a tensor can count")
        for bound, limit in f.metadata["bounds"].items():
            if not _within(value, bound, limit):
                raise ValueError(f"{section}.{f.name}={value} must be {bound} {limit}")


def _within(value: float, bound: str, limit: float) -> bool:
    if bound == "at least":
        return value >= limit
    if bound == "above":
        return value > limit
    return value <= limit if bound == "at most" else value < limit


@dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of a model. Raises ValueError, naming the key, for an impossible value. Source: docs/gsa.md."""

    d_model: int = key(512, "Width of the residual stream.", above=0, resume="impossible")
    n_layers: int = key(8, "Number of blocks.", above=0, resume="impossible")
    n_heads: int = key(8, "Query heads (H).", above=0, resume="impossible")
    n_kv_heads: int = key(2, "Key/value heads (G); must divide n_heads.", above=0, resume="impossible")
    d_head: int | None = key(None, "Width of a head (D), even. Default: d_model / n_heads.", resume="impossible")
    d_ffn: int = key(1536, "Hidden width of the SwiGLU feed-forward.", above=0, resume="impossible")
    vocab_size: int = key(
        32000, "Entries of the embedding (V); at least as many as the tokenizer has.", above=0, resume="impossible"
    )
    max_position_embeddings: int = key(2048, "Longest sequence, in tokens.", above=0, resume="curve")
    rope_base: float = key(10000.0, "Base of the rotary position frequencies.", above=0, resume="curve")
    norm_eps: float = key(1e-5, "Epsilon of RMSNorm.", above=0, resume="curve")
    init_std: float = key(0.02, "Standard deviation of the initial weights.", above=0, resume="curve")
    tie_embeddings: bool = key(True, "Use the embedding matrix as the output head.", resume="impossible")
    sparse: bool = key(
        True, "Select keys with an indexer; false: dense attention without indexer parameters.", resume="impossible"
    )
    value_gate: bool = key(True, "Put a sigmoid gate on the values; false: no gate.", resume="impossible")
    output_gate: bool = key(True, "Put a sigmoid gate on the attention output; false: no gate.", resume="impossible")
    d_indexer: int = key(64, "Width of an indexer head (E), even.", above=0, resume="impossible")
    n_indexer_heads: int = key(4, "Indexer heads (J).", above=0, resume="impossible")
    indexer_rope: bool = key(True, "Rotate the indexer's queries and keys by position.", resume="curve")
    k_base: int = key(512, "Selected keys per query before adaptation.", above=0, resume="curve")
    k_min: int = key(128, "Fewest selected keys per query, if that many are visible.", above=0, resume="curve")
    k_max: int = key(1024, "Most selected keys per query.", above=0, resume="curve")
    adaptive_k: Literal["off", "variance", "entropy"] = key(
        "variance",
        "How the number of selected keys adapts to a query: not at all, or by the variance or entropy of its scores.",
        resume="curve",
    )
    adaptive_k_temperature: float = key(
        1.0, "How strongly adaptive_k=variance reacts to the variance (c in docs/gsa.md).", at_least=0, resume="curve"
    )

    def __post_init__(self) -> None:
        check_keys(self, "model")
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


ADAPTIVE_K = get_args(get_type_hints(ModelConfig)["adaptive_k"])
"""The choices of model.adaptive_k."""
