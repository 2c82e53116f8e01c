"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or refused; the message names the file and what to do."""
