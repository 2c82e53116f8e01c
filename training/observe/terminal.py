"""Standard output and standard error that are lost or full: the run goes on without them."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


class LossyStream:
    """Wraps stdout or stderr: what cannot be written is dropped instead of raising, so that the run can save.

    When the reader has gone (a closed terminal, `| head`), everything that follows is dropped. When the disk of a log
    file is full, later lines are tried again.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as err:  # ValueError: somebody has closed it
            self._lost(err)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as err:
            self._lost(err)

    def _lost(self, err: Exception) -> None:
        if isinstance(err, OSError) and err.errno in (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # libraries write to the descriptor
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_lost_output() -> None:
    """Makes this process independent of where its output goes. Call it before anything else opens a file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get this number, and every print with it
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout, sys.stderr = (
        LossyStream(open(descriptor, "w", encoding="utf-8") if stream is None else stream)  # noqa: SIM115
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr))
    )
