"""The training loop and its reflexes."""
