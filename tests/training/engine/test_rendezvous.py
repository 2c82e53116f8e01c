"""The ranks meet before there is a process group: a port that is taken, and a rank that dies early, are named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from support.launching import ROOT, free_port, rank_environment

RANK = textwrap.dedent("""
    import sys, time
    from training.engine import rendezvous
    from training.engine.rendezvous import Meeting

    rendezvous.ABSENT_S = 1.0
    meeting = Meeting(60.0, lost_s=3.0)
    print("met", flush=True)
    if sys.argv[1] == "waits":
        time.sleep(100)
    heard = meeting.hear_all(None)
    print("heard", heard, flush=True)
    meeting.part()
    sys.exit(heard.exit_code if heard else 0)
""")


def start(rank: int, port: int, mode: str = "") -> subprocess.Popen:
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, mode],
        cwd=ROOT,
        env={**rank_environment(), **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_before_there_is_a_process_group_is_named_by_the_other(victim):
    port = free_port()
    pair = [start(rank, port, "waits" if rank == victim else "") for rank in (0, 1)]
    for rank in pair:
        assert rank.stdout.readline() == "met\n"
    os.kill(pair[victim].pid, signal.SIGKILL)
    text = pair[1 - victim].communicate(timeout=60)[0]
    assert pair[1 - victim].returncode == 1
    if victim == 1:
        assert f"error: rank 1 (pid {pair[1].pid} on {socket.gethostname()}) gave no sign of life for 3 s" in text
    else:  # the store went with rank 0
        assert "rank 0 has died" in text or "not all ranks have been ready" in text
    pair[victim].wait()


def test_a_rank_that_has_not_come_is_named_and_waited_for():
    port = free_port()
    first = start(0, port)
    assert first.stdout.readline() == "met\n"
    assert first.stdout.readline() == "waiting for rank 1, not started yet\n"
    second = start(1, port)
    outputs = [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]]
    assert outputs == ["heard None\n", "met\nheard None\n"] and [first.returncode, second.returncode] == [0, 0]


def test_a_port_that_is_taken_is_refused_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = start(0, port).communicate(timeout=60)[0]
    assert f"Refusal: port {port}, where the ranks are to meet, is taken on this host" in text
    assert "deepspeed --master_port N" in text
