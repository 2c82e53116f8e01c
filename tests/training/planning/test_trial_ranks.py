"""How the ranks of a trial are run and ended, and what their ends mean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.launching import ROOT, rank_environment

from training.planning import trial_ranks
from training.planning.outcome import Outcome
from training.planning.trial_ranks import SignalCheck, combined_outcome, read_ends, run_ranks


def end_of_ranks(tmp_path: Path, programs: list[str], *, patience_s: float = 60.0, capped: bool = False) -> Outcome:
    """The outcome of ranks that run these programs, which for speed do not import torch."""
    script = (
        "import json, os, sys, time\nrank = int(os.environ['RANK'])\nfolder = sys.argv[1]\nexec(sys.argv[2 + rank])\n"
    )
    with trial_ranks.SignalCheck() as signals:
        command = [sys.executable, "-c", script, str(tmp_path), *programs]
        codes = run_ranks(command, len(programs), tmp_path, patience_s=patience_s, signals=signals)
    return combined_outcome(read_ends(tmp_path, codes, capped=capped))


def writes(outcome: str) -> str:
    return f"open(f'{{folder}}/rank_{{rank}}.json', 'w').write(json.dumps({outcome}))"


OK = "dict(verdict='ok', step_seconds=[1.0 + rank, 3.0 - rank], peak_gib=0.5 + rank, backend='chunked')"
WAIT = "time.sleep(1000)"


def test_each_step_is_as_slow_as_its_slowest_rank_and_the_peak_is_the_highest_of_a_rank(tmp_path):
    outcome = end_of_ranks(tmp_path, [writes(OK), writes(OK)])
    assert outcome == Outcome("ok", None, (2.0, 3.0), 1.5, None, "chunked")


@pytest.mark.parametrize(
    "programs, verdict, words",
    [
        (
            [writes("dict(verdict='out_of_memory', reason='no room', step_seconds=[])") + "; sys.exit(1)", WAIT],
            "out_of_memory",
            "no room",
        ),
        ([WAIT, "os.kill(os.getpid(), 9)"], "out_of_memory", "rank 1 was killed"),
        ([WAIT, "sys.exit(137)"], "out_of_memory", "rank 1 was killed"),
        (
            [WAIT, "print('terminate called: std::bad_alloc', flush=True); os.abort()"],
            "out_of_memory",
            "std::bad_alloc",
        ),
        ([WAIT, "print('MemoryError: while printing a traceback'); sys.exit(1)"], "out_of_memory", "MemoryError"),
        ([WAIT, "os.abort()"], "failed", "rank 1 ended with code -6: it printed nothing"),
        (
            [WAIT, writes("dict(verdict='failed', reason='ValueError: k', step_seconds=[])") + "; sys.exit(1)"],
            "failed",
            "ValueError: k",
        ),
        (
            [writes(OK), "print('Traceback'); print('ImportError: x'); sys.exit(1)"],
            "failed",
            "rank 1 ended with code 1: ImportError: x",
        ),
    ],
)
def test_running_out_of_memory_is_distinguished_from_failing(tmp_path, monkeypatch, programs, verdict, words):
    """The other rank, which would wait for ever, is ended."""
    monkeypatch.setattr(trial_ranks, "PEERS_GRACE_S", 0.5)
    outcome = end_of_ranks(tmp_path, programs)
    assert (outcome.verdict, words in outcome.reason) == (verdict, True), outcome


@pytest.mark.parametrize("capped, verdict", [(True, "out_of_memory"), (False, "failed")])
def test_std_terminate_means_out_of_memory_under_a_cap_only(tmp_path, monkeypatch, capped, verdict):
    """It was seen while process groups were made close to the cap; without a cap it may be a limit on processes."""
    monkeypatch.setattr(trial_ranks, "PEERS_GRACE_S", 0.5)
    aborts = "print('terminate called without an active exception', flush=True); os.abort()"
    assert end_of_ranks(tmp_path, [aborts, WAIT], capped=capped).verdict == verdict


def test_ranks_that_hang_are_ended(tmp_path):
    began = time.monotonic()
    outcome = end_of_ranks(tmp_path, [WAIT, WAIT], patience_s=0.5)
    assert time.monotonic() - began < 10
    assert (outcome.verdict, outcome.reason) == ("failed", "rank 0 gave no sign of life: it printed nothing")


@pytest.mark.parametrize("number", trial_ranks.HANDLED_SIGNALS)
def test_nothing_outlives_a_tuner_that_is_stopped(tmp_path, number):
    """Two ranks and a child of each, which would all sleep for ever."""
    rank = "import os, subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)"
    program = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests run under nohup
from training.planning.trial_ranks import Interrupted, SignalCheck, run_ranks
try:
    with SignalCheck() as signals:
        run_ranks([sys.executable, "-c", {rank!r}], 2, Path(sys.argv[1]), patience_s=1000, signals=signals)
except Interrupted as err:
    sys.exit(f"stopped by {{err}}")
"""
    tuner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=rank_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, started = time.monotonic() + 60, []
    try:
        while len(started := psutil.Process(tuner.pid).children(recursive=True)) < 4:
            assert time.monotonic() < deadline and tuner.poll() is None
            time.sleep(0.05)
        tuner.send_signal(number)
        assert f"stopped by {number.name}" in tuner.communicate(timeout=60)[1] and tuner.returncode == 1
        assert not psutil.wait_procs(started, timeout=60)[1]
    finally:
        tuner.kill()
        for process in started:
            if process.is_running():
                process.kill()


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalCheck() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)
