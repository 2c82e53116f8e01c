"""Earlier names of what is in recompute_cache.py, under which others may import it."""

from gsa.kernels.recompute_cache import recomputation_contexts as saved_by_checkpointing
from gsa.kernels.recompute_cache import reuse_when_recomputing as kept

__all__ = ["kept", "saved_by_checkpointing"]
