"""The configuration of a run: its keys, batch arithmetic, what a change means on resume, the one DeepSpeed dict."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.config.public import *  # noqa: F403


def __getattr__(name: str) -> object:
    """Imports the public names, and torch with them, only when one is used.

    exit_codes.py and command.py need neither. So a command like prepare_data, and each of its workers, starts in a
    fraction of the time and memory.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import training.config.public as public

    return getattr(public, name)
