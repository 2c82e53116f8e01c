"""A wish to stop, from outside: save at the next step boundary, then end in order."""

from __future__ import annotations

import ctypes
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

DEBOUNCE_S = 0.8
"""Signals within it are one wish: on Ctrl-C the terminal signals the ranks, and DeepSpeed's launcher once more."""


class StopRequest:
    """Remembers the first signal as `number`, 0 before. Then a later one ends the process, even in a collective."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if self.number:
            return
        self.number = number
        timer = threading.Timer(DEBOUNCE_S, _end_at_once_from_now_on)
        timer.daemon = True
        timer.start()


def _end_at_once_from_now_on() -> None:
    # Python sets handlers on its main thread alone, and runs them there: it may be waiting in a collective
    c = ctypes.CDLL(None)
    c.signal.argtypes, c.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for number in STOP_SIGNALS:
        c.signal(number, None)  # SIG_DFL
