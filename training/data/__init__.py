"""Text to tokens to windows to batches, in an order that is a pure function of seed and position."""

from training.data.dataset import FORMAT, IGNORE, MANIFEST_KEYS, Batch, DataError, PackedTokens, read_manifest
from training.data.loader import Loader, past, step_samples
from training.data.open import open_data

__all__ = [
    "FORMAT",
    "IGNORE",
    "MANIFEST_KEYS",
    "Batch",
    "DataError",
    "Loader",
    "PackedTokens",
    "open_data",
    "past",
    "read_manifest",
    "step_samples",
]
