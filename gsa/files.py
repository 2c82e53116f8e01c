"""Writing a file whole or not at all, and reading a file that may be anything."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def write_atomically(path: Path, *, durable: bool, unique: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for writing; when the block ends, it replaces `path` in one step.

    A reader finds either the old content or all of the new, even after the writer was killed. When the block raises,
    `path` is untouched and the temporary file is removed; a kill leaves it behind as `<name>.tmp`. A library that
    writes to a path, not to a file, may write to the `name` of the file instead.

    durable: the content and the name survive a power cut once the block has ended (fsync of file and folder).
    unique: the temporary file gets a name that no other writer uses, for a path that several processes may write at
    the same time.
    Raises OSError when the disk refuses; when only the last fsync, of the folder, fails, `path` has its new content.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if unique else f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        if durable:
            fsync(temporary)  # by name: who wrote to the file's name may have put another file there
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_small_file(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most `limit_bytes`.

    Raises OSError for a longer file, of which no more is read, and for what is no regular file: opening a named pipe
    would wait for its writer, and a device never ends.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than the {limit_bytes:,} bytes that it may have", str(path))
    return content


def open_regular(path: Path) -> int:
    """A file descriptor for reading a regular file. Raises OSError, without waiting, for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file but a folder, pipe or device", str(path))
    return descriptor
