"""The workshop: turns text and a configuration into checkpoints. A file directly in it is a command."""
