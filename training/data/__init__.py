"""Text to tokens to windows to batches, in an order that is a pure function of seed and position."""

from training.data.dataset import Batch, DataError, Loader, PackedTokens, past, step_samples

__all__ = ["Batch", "DataError", "Loader", "PackedTokens", "past", "step_samples"]
