"""Weights & Biases and TensorBoard: the sinks, the thread that feeds them, and the identity of the tracked run."""
