"""A rank that hangs, stops or dies is named, with stacks, and the run ends. Real processes, no DeepSpeed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from support.launching import ROOT, rank_environment

RANK = textwrap.dedent("""
    import shutil, sys, time
    from pathlib import Path
    from training.loop.watchdog import Watchdog

    def late_in_here():
        time.sleep(60)

    folder, rank, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with Watchdog(folder, rank=rank, size=2, timeout_s=3.0, launch="L") as dog:
        while mode in ("hang", "stop", "die") and len(list((folder / ".ranks").glob("rank_?.json"))) < 2:
            time.sleep(0.01)  # both begin together, as ranks after creating a process group
        for step in range(400):
            dog.beat("data")
            if mode == "hang" and rank == 1 and step == 3:
                late_in_here()
            dog.beat("backward")
            if mode in ("hang", "stop", "die") and step == 6:
                time.sleep(60)  # as in a collective that waits for the other rank
            time.sleep(0.02)
            if mode == "fine" and step == 20:
                break
            if mode == "disk" and step == 3:
                shutil.rmtree(folder / ".ranks")  # from now on nothing can be written
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


@pytest.mark.parametrize("mode", ["fine", "patient"])
def test_the_watchdog_prints_nothing_and_ends_nothing_in_a_healthy_run(tmp_path, mode):
    pair = start_pair(tmp_path, mode)
    assert outputs(pair) == ["", ""]
    assert [rank.returncode for rank in pair] == [0, 0]


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
    while not (tmp_path / ".ranks" / "rank_1.json").exists():
        time.sleep(0.1)
    time.sleep(1.5)  # until the other rank has read its file
    os.kill(pair[1].pid, signal.SIGKILL)
    pair[1].wait()
    text = pair[0].communicate(timeout=60)[0]
    assert f"rank 1 (pid {pair[1].pid}" in text and "died" in text
    assert pair[0].returncode == 1


def test_a_rank_that_was_stopped_is_named_by_the_other_rank(tmp_path):
    pair = start_pair(tmp_path, "stop")
    while not (tmp_path / ".ranks" / "rank_1.json").exists():
        time.sleep(0.1)
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        text = pair[0].communicate(timeout=60)[0]
    finally:
        os.kill(pair[1].pid, signal.SIGKILL)
        pair[1].communicate()
    assert f"rank 1 (pid {pair[1].pid}" in text
    assert pair[0].returncode == 1


def test_a_failing_disk_is_reported_once_and_does_not_hide_the_error_of_the_run(tmp_path):
    lone = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), "0", "disk"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    assert lone.stderr.count("watchdog: rank 0 cannot write its sign of life: [Errno 2]") == 1
    assert lone.returncode == 1 and lone.stderr.splitlines()[-1] == "ValueError: the error of the run"


def test_files_of_an_earlier_launch_are_ignored(tmp_path):
    ranks = tmp_path / ".ranks"
    ranks.mkdir()
    (ranks / "rank_1.json").write_text(
        '{"launch": "older", "pid": 1, "host": "x", "state": "running", "time": 0, "count": 0}'
    )
    lone = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), "0", "fine"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    assert (lone.returncode, lone.stderr) == (0, "")
