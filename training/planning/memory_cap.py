"""Limits the memory of this process, and measures the most that it has held."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gsa.units import GIB, size_text


@contextmanager
def memory_cap(cap_gib: float, device: torch.device) -> Iterator[None]:
    """Inside the block, an allocation that would take this process beyond the cap raises an exception.

    MemoryError at the start when the process holds more already. On a GPU torch's allocator enforces the cap. On a CPU
    the kernel does, by RLIMIT_DATA: it limits private writable memory, which tensors, heaps and stacks consist of, so
    that torch's allocator raises as a GPU's does. RLIMIT_AS would count address space, which mapped files, libraries
    and the heaps that glibc reserves per thread fill without using memory; Linux does not enforce RLIMIT_RSS.

    The room left is the cap less the memory that is resident now. Pages of libraries that are touched later are not
    limited (a peak of 0.95 GiB was seen under a cap of 0.9). Map the shards of the text before: their whole length
    counts as data. The limit is lifted at the end, since reporting an error takes memory too.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total), device)
        yield
        return
    held = status_bytes("VmRSS")
    room = int(cap_gib * GIB) - held
    if room <= 0:
        raise MemoryError(
            f"a rank holds {size_text(held)} before it has a model, more than --memory_cap_gib {cap_gib:g}"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def peak_gib(device: torch.device) -> tuple[float, float | None]:
    """(the most memory that this process has held, the part of it that tensors took); see `Outcome`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB, torch.cuda.max_memory_allocated(device) / GIB
    # getrusage's ru_maxrss is no substitute: it starts from what the parent process held
    return status_bytes("VmHWM") / GIB, None


def status_bytes(field: str) -> int:
    """A memory field of /proc/self/status in bytes, e.g. VmRSS. psutil has no VmHWM, and its `data` includes stacks."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024
