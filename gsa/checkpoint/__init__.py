"""What a checkpoint directory is: docs/checkpoints.md. Knows torch, never DeepSpeed or training."""
