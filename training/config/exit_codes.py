"""The exit codes of every command, and the errors that carry one."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a command ends with. docs/running.md has the same table."""

    FINISHED = 0
    """Done; or, for a training run, stopped on request with a checkpoint (run.json says which)."""
    FAILED = 1
    """Anything that is not listed here: a bug, a lost rank, a full disk outside a save."""
    REFUSED_CONFIG = 2
    """A refused configuration, argument or folder: change what the command was given."""
    REFUSED_INPUT = 3
    """A refused checkpoint, dataset or run: missing or damaged. Restore it or name another."""
    DIVERGED = 4
    """The loss or the gradient norm is no longer finite, or three launches in a row have ended at one step."""


class Refusal(ValueError):
    """Input that is refused before anything is changed. The message says what is wrong, where, and how to mend it."""

    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED_CONFIG


def exit_code_of(err: Exception) -> ExitCode:
    """The exit code of a Refusal or a CheckpointError."""
    return err.exit_code if isinstance(err, Refusal) else ExitCode.REFUSED_INPUT
