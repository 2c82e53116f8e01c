"""The outcome of a trial, and how running out of memory is distinguished from other failures."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

import torch

TrialVerdict = Literal["ok", "out_of_memory", "failed"]

OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
    "memoryerror",
)
"""Messages of allocators: torch's on a CPU, the system, CUDA and NCCL, C++, cuBLAS, and an exception's name that a data
loading thread passes on."""

STARVED_MESSAGES = ("resource temporarily unavailable", "can't start new thread", "terminate called")
"""Messages seen only under a memory cap: thread creation failed, or C++ called std::terminate."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    reason: one line, when it did not end well. step_seconds: of the timed steps. peak_gib: the most memory that a rank
    held, which is resident memory on a CPU and what torch's allocator reserved on a GPU. peak_allocated_gib: the part
    of it that tensors took; None on a CPU. printed: the end of the output of a rank that failed.
    """

    verdict: TrialVerdict
    reason: str | None = None
    step_seconds: tuple[float, ...] = ()
    peak_gib: float | None = None
    peak_allocated_gib: float | None = None
    backend: str | None = None
    printed: str | None = None

    @property
    def seconds(self) -> float:
        """The median of the steps."""
        return median(self.step_seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the steps, in seconds; 0 for a single step."""
        if len(self.step_seconds) == 1:
            return 0.0
        low, _, high = quantiles(self.step_seconds, n=4, method="inclusive")
        return (high - low) / 2


def is_out_of_memory(err: BaseException, *, capped: bool) -> bool:
    """Whether an exception, or one that caused it, reports that memory has run out. capped: under a memory cap."""
    if isinstance(err, (MemoryError, torch.OutOfMemoryError)):
        return True
    cause = err.__cause__ or err.__context__
    return reports_out_of_memory(str(err), capped=capped) or (
        cause is not None and is_out_of_memory(cause, capped=capped)
    )


def reports_out_of_memory(text: str, *, capped: bool) -> bool:
    """Whether a text contains a message of memory that has run out. capped: under a memory cap."""
    messages = (*OUT_OF_MEMORY_MESSAGES, *STARVED_MESSAGES) if capped else OUT_OF_MEMORY_MESSAGES
    return any(message in text.lower() for message in messages)


def first_line(err: BaseException) -> str:
    """An exception's type and the first line of its message, without the C++ frames that torch appends."""
    lines = [line for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0].strip()}" if lines else type(err).__name__
