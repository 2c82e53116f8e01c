"""Gated Sparse Attention language models: docs/gsa.md defines them."""

from typing import TYPE_CHECKING

from gsa.config import ModelConfig

if TYPE_CHECKING:
    from gsa.model import GSAForCausalLM

__all__ = ["GSAForCausalLM", "ModelConfig"]


def __getattr__(name: str) -> object:
    """Imports the model, and torch with it, only when it is used: many commands and their workers need neither."""
    if name == "GSAForCausalLM":
        from gsa.model import GSAForCausalLM

        return GSAForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
