"""Lets a test meet "Permission denied" even when root runs it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_IGNORE_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def permissions_apply() -> Iterator[None]:
    """Inside the block, this thread may read and write only what the permissions of files and folders allow."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice

    def call(name: str) -> None:
        if getattr(libc, name)(header, data):
            raise OSError(ctypes.get_errno(), name)

    call("capget")
    before = data[0]
    data[0] = before & ~_IGNORE_PERMISSIONS
    call("capset")
    try:
        yield
    finally:
        data[0] = before
        call("capset")
