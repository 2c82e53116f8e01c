"""What a run leaves on disk besides checkpoints, and how anyone reads it back."""
