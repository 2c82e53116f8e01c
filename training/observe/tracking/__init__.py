"""Weights & Biases and TensorBoard: sinks, the thread that feeds them, and which tracked run a launch is."""
