"""Graceful stop on SIGTERM, SIGUSR1 or SIGINT: save at the next step boundary, then end in order."""

from __future__ import annotations

import ctypes
import signal
import threading

import torch
import torch.distributed as dist

from training.config.signals import STOP_SIGNALS

DEBOUNCE_S = 0.8
"""Signals within this time count as one: on Ctrl-C the terminal signals the ranks, and DeepSpeed's launcher does it
once more."""


class StopRequest:
    """Remembers the first stop signal as `number` (0 before). A later one ends the process, even in a collective."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        """Installs the signal handlers; call it on the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if self.number:
            return
        self.number = number
        timer = threading.Timer(DEBOUNCE_S, _restore_default_handlers)
        timer.daemon = True
        timer.start()

    def agree(self, device: torch.device) -> int:
        """The highest signal that any rank has received. A collective: every rank must call it."""
        received = torch.tensor([self.number], device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return int(received)


def _restore_default_handlers() -> None:
    # Python installs handlers on its main thread alone, and runs them there: it may be waiting in a collective
    c = ctypes.CDLL(None)
    c.signal.argtypes, c.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for number in STOP_SIGNALS:
        c.signal(number, None)  # SIG_DFL
