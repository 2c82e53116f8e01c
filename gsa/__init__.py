"""Gated Sparse Attention language models: docs/gsa.md defines them."""

from gsa.config import ModelConfig
from gsa.model import GSAForCausalLM

__all__ = ["GSAForCausalLM", "ModelConfig"]
