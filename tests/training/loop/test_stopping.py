"""Stop requests: the first signal is remembered, and a later one ends the process, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import ROOT, clean_environment

from training.loop.stopping import DEBOUNCE_S, STOP_SIGNALS

PROGRAM = """
import ctypes, os, signal, time
from training.loop.stopping import StopRequest
request = StopRequest()
request.listen()
print("listening", flush=True)
while not request.number:
    time.sleep(0.01)
for again in (signal.SIGTERM, signal.SIGINT):  # at once: they count as the same request
    os.kill(os.getpid(), again)
print("asked", request.number, flush=True)
for _ in range(9):  # a signal that is handled ends a sleep early
    ctypes.CDLL(None).sleep(30)  # as in a collective: Python runs no handler until it returns
print("slept")
"""


BUSY = """
import os, subprocess
from training.loop.stopping import StopRequest
request = StopRequest()
request.listen()
print("listening", flush=True)
signals = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -INT {os.getpid()}; kill -TERM {os.getpid()}"])
sum(range(10**8))  # one call; Python runs handlers only after it
signals.wait()
print("asked", request.number, flush=True)
"""


def started(program: str = PROGRAM) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "listening\n"
    return process


def handled(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_signals_close_together_are_one_request_and_a_later_one_ends_the_process_inside_a_call(first):
    process = started()
    process.send_signal(first)
    assert process.stdout.readline() == f"asked {first}\n"
    time.sleep(DEBOUNCE_S)
    deadline = time.monotonic() + 30
    while handled(process.pid, signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM  # it would sleep for 270 s
    assert process.stdout.read() == ""


def test_two_signals_during_one_call_are_one_request_and_print_nothing():
    process = started(BUSY)
    assert process.communicate(timeout=60)[0] in (f"asked {number}\n" for number in (signal.SIGINT, signal.SIGTERM))
    assert process.returncode == 0
