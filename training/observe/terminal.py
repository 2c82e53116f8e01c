"""Standard output and standard error after their terminal has gone."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Terminal:
    """Wraps stdout or stderr: once the terminal is gone, writes are dropped instead of raising, so the run can save."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._drop_output()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop_output()

    def _drop_output(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_hangup() -> None:
    """Wraps stdout and stderr where they are terminals."""
    sys.stdout, sys.stderr = (Terminal(s) if s.isatty() else s for s in (sys.stdout, sys.stderr))
