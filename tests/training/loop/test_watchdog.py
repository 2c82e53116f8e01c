"""A rank that hangs, stops or dies is named, with stacks, and the run ends. Real processes, no DeepSpeed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

from support.launching import ROOT, rank_environment

RANK = textwrap.dedent("""
    import os, shutil, socket, sys, time
    from pathlib import Path
    from training.loop import watchdog
    from training.loop.watchdog import Watchdog

    def late_in_here():
        time.sleep(60)

    folder, rank, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    alone = mode in ("disk", "patient", "alone")

    def wait_for_the_other(step):  # as a collective does
        (folder / f"at_{rank}_{step}").touch()
        while not alone and not (folder / f"at_{1 - rank}_{step}").exists():
            time.sleep(0.01)

    if mode == "clock":  # one clock is behind; both are stepped, forwards and back
        began = time.monotonic()
        real = time.time
        time.time = lambda: real() - 60 * rank + (3600 if 1 < time.monotonic() - began < 2 else 0)
    if mode == "containers":  # one host name, and pids that mean nothing to the other
        socket.gethostname = lambda: "cloned"
        watchdog.machine = lambda: f"namespace {rank}"
        watchdog.os.getpid = lambda: 2**22 + rank
        watchdog._started = lambda pid: 1
    if mode == "unwritable" and rank == 1:
        (folder / ".ranks" / "rank_1.json.tmp").mkdir(parents=True)

    storage_s = 3.0 if mode in ("hang", "disk", "alone") else 60.0
    with Watchdog(folder, rank=rank, size=2, timeout_s=3.0, storage_s=storage_s, launch="L") as dog:
        wait_for_the_other("start")
        for step in range(6 if alone else 40):
            dog.beat("data")
            if mode == "hang" and rank == 1 and step == 3:
                late_in_here()
            if mode == "stall" and rank == 1 and step == 3:
                time.sleep(6)  # a file server fails over
            dog.beat("backward")
            if mode == "die" and rank == 1 and step == 30:
                (folder / "dying").touch()
                time.sleep(60)
            if mode == "slow" and step == 10:
                time.sleep(2.5)
            if mode == "slow" and step == 20:
                time.sleep(5)  # longer than timeout_s, but not much longer than this run has seen
            wait_for_the_other(step)
            time.sleep(0.1)
            if mode == "disk" and step == 3:
                shutil.rmtree(folder / ".ranks")
                (folder / ".ranks").write_text("in the way")  # from now on nothing can be written
                time.sleep(2.5)
                raise ValueError("the error of the run")
            if mode == "patient" and step == 3:
                dog.beat("save")
                time.sleep(5)
                break
""")


def start_pair(folder, mode):
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), mode],
            cwd=ROOT,
            env=rank_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


def outputs(pair, timeout=120):
    return [rank.communicate(timeout=timeout)[0] for rank in pair]


HEALTHY = ["fine", "patient", "clock", "containers", "stall", "slow", "unwritable", "stopped for a while"]


def test_the_watchdog_prints_nothing_and_ends_nothing_in_a_healthy_run(tmp_path):
    """All at once, since they mostly wait."""
    pairs = {}
    for mode in HEALTHY:
        (tmp_path / mode).mkdir()
        pairs[mode] = start_pair(tmp_path / mode, mode)
    stopped = pairs["stopped for a while"][1]
    while not (tmp_path / "stopped for a while" / "at_1_3").exists():
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(stopped.pid, signal.SIGCONT)
    for mode, pair in pairs.items():
        texts = outputs(pair)
        assert [rank.returncode for rank in pair] == [0, 0], (mode, texts)
        if mode == "unwritable":
            assert texts[0] == "" and texts[1].count("watchdog: rank 1 cannot write its sign of life: [Errno 21]") == 1
        else:
            assert texts == ["", ""], mode


def test_the_rank_that_hangs_is_named_and_every_stack_is_dumped(tmp_path):
    pair = start_pair(tmp_path, "hang")
    texts = outputs(pair)
    assert [rank.returncode for rank in pair] == [1, 1]
    for text in texts:
        assert f"rank 1 (pid {pair[1].pid} on" in text and "in phase 'data'): silent for more than 3 s" in text
        assert "rank 0 (pid" not in text.split("silent")[0]
    assert "late_in_here" in texts[1]
    assert "late_in_here" in (tmp_path / ".ranks" / "stacks_rank_1.txt").read_text()
    assert (tmp_path / ".ranks" / "stacks_rank_0.txt").exists()


def test_a_rank_that_died_is_named_by_the_other_rank(tmp_path):
    pair = start_pair(tmp_path, "die")
    while not (tmp_path / "dying").exists():
        time.sleep(0.1)
    os.kill(pair[1].pid, signal.SIGKILL)
    pair[1].wait()
    text = pair[0].communicate(timeout=60)[0]
    assert f"rank 1 (pid {pair[1].pid}" in text and "died" in text
    assert pair[0].returncode == 1


def test_a_rank_that_was_stopped_is_named_by_the_other_rank(tmp_path):
    pair = start_pair(tmp_path, "stop")
    while not (tmp_path / "at_1_3").exists():
        time.sleep(0.1)
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        text = pair[0].communicate(timeout=60)[0]
    finally:
        os.kill(pair[1].pid, signal.SIGKILL)
        pair[1].communicate()
    assert f"rank 1 (pid {pair[1].pid}" in text and "gave no sign of life for 3 s (stopped or swapped out?)" in text
    assert pair[0].returncode == 1


def test_a_failing_disk_is_reported_once_and_does_not_hide_the_error_of_the_run(tmp_path):
    lone = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), "0", "disk"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    assert lone.stderr.count("watchdog: rank 0 cannot write its sign of life: [Errno 17]") == 1
    assert lone.returncode == 1 and lone.stderr.splitlines()[-1] == "ValueError: the error of the run"


def test_files_of_an_earlier_launch_are_ignored(tmp_path):
    ranks = tmp_path / ".ranks"
    ranks.mkdir()
    (ranks / "rank_1.json").write_text(
        '{"launch": "older", "pid": 1, "host": "x", "state": "running", "ticks": 0, "count": 0}'
    )
    lone = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), "0", "alone"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    assert (lone.returncode, lone.stderr) == (0, "")
