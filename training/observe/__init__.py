"""What a live run shows and sends: terminal, trackers, GPU samples."""
