"""Saving in the background, choosing what to resume, proving a checkpoint."""
