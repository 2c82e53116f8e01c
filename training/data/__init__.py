"""Text to tokens to windows to batches, in an order that is a pure function of seed and position.

The public names are loaded when they are first used: prepare_data and its workers use this package without torch.
"""

from __future__ import annotations

from typing import Any

_DATASET = ("FORMAT", "IGNORE", "MANIFEST_KEYS", "Batch", "DataError", "PackedTokens", "raise_fault", "read_manifest")
_LOADER = ("Loader", "past", "step_samples")


def __getattr__(name: str) -> Any:
    if name in _DATASET:
        from training.data import dataset as home
    elif name in _LOADER:
        from training.data import loader as home
    elif name == "open_data":
        from training.data import open as home
    elif name in ("BLOCK", "Order", "permute"):
        from training.data import order as home
    elif name == "BatchPlan":
        from training.config import batch as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
