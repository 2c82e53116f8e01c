"""One folder, one writer: who may take a lease, from whom, and when. Real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.launching import ROOT, clean_environment

from training.config import lease as leases
from training.config.lease import LEASE, LeaseError, Owner, is_dead, owned, read_lease, take

HOLDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from training.config import lease

    lease.HEARTBEAT_S = 0.1
    held = lease.take(Path(sys.argv[1]), command="holder")
    if sys.argv[2] == "stopping":
        held.phase = lambda: "stopping"
    print("holds", flush=True)
    sys.stdin.readline()
    held.release()
""")


def holder(folder: Path, mode: str = "", **environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), mode],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(leases, "SETTLE_S", 0.2)


def elsewhere(folder: Path) -> Owner:
    """The lease of a process on another machine, in the file."""
    with owned(folder, command="training/train.py"):
        own = read_lease(folder)
    far = replace(own, token="far", host="far", machine="another boot", job="")
    (folder / LEASE).write_text(json.dumps(asdict(far)))
    return far


def test_a_living_owner_is_named_and_its_folder_is_taken_after_its_end(tmp_path, quick):
    first = holder(tmp_path)
    with pytest.raises(LeaseError, match=rf"is in use by holder \(pid {first.pid} on .*--take_over"):
        take(tmp_path, command="second")
    first.communicate("\n", timeout=60)
    assert first.returncode == 0 and read_lease(tmp_path) is None
    take(tmp_path, command="second").release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_of_this_machine_is_replaced_at_once(tmp_path, quick, capsys):
    first = holder(tmp_path)
    first.kill()
    first.wait()
    assert is_dead(read_lease(tmp_path)) is True
    lease = take(tmp_path, command="second")
    assert read_lease(tmp_path).token == lease.owner.token and "who is dead" in capsys.readouterr().out
    lease.release()


def test_another_process_with_the_same_pid_is_not_the_owner(tmp_path):
    with owned(tmp_path, command="x"):
        own = read_lease(tmp_path)
    assert is_dead(replace(own, started=own.started - 1)) is True and is_dead(own) is False


@pytest.mark.parametrize("text", [None, "torn {", "[]", '{"token": 3}', "[" * 3000])
def test_an_owner_elsewhere_or_a_damaged_lease_is_replaced_when_it_stands_still(tmp_path, quick, text):
    far = elsewhere(tmp_path)
    if text is not None:
        (tmp_path / LEASE).write_text(text)
    began = time.monotonic()
    lease = take(tmp_path, command="second", patience_s=1.0)
    assert time.monotonic() - began >= 1.0 and read_lease(tmp_path).token == lease.owner.token != far.token
    lease.release()


def test_an_owner_elsewhere_whose_heartbeat_moves_is_alive_whatever_its_clock_says(tmp_path, quick):
    far = elsewhere(tmp_path)
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.1):
            count += 1
            text = json.dumps(asdict(replace(far, count=count, since="1999-01-01")))
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", tmp_path / LEASE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LeaseError, match="is in use by training/train.py .* on far"):
            take(tmp_path, command="second", patience_s=30.0)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("mode", "job"), [("stopping", ""), ("", "77")])
def test_a_launch_waits_for_an_owner_that_is_about_to_end_or_is_of_its_own_job(tmp_path, quick, monkeypatch, mode, job):
    first = holder(tmp_path, mode, SLURM_JOB_ID=job)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    time.sleep(0.5)  # until the phase is in the file
    threading.Timer(1.0, lambda: first.communicate("\n")).start()
    lease = take(tmp_path, command="second", requeue_s=60.0)
    assert first.poll() == 0 or first.wait(timeout=60) == 0
    lease.release()


def test_an_owner_whose_folder_is_taken_over_ends_without_writing(tmp_path, quick):
    first = holder(tmp_path)
    lease = take(tmp_path, command="second", take_over=True)
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 1 and "was taken over by second (pid" in text
    assert read_lease(tmp_path).token == lease.owner.token
    lease.release()


def test_a_lease_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LEASE)
    assert "damaged" in read_lease(tmp_path) or "cannot be read" in read_lease(tmp_path)
    (tmp_path / LEASE).unlink()
    (tmp_path / LEASE).symlink_to("/dev/zero")
    assert "cannot be read" in read_lease(tmp_path)


def test_one_process_can_take_a_folder_twice_and_gives_it_back_once_both_are_done(tmp_path):
    first = take(tmp_path / "new", command="x")
    second = take(tmp_path / "new", command="x")
    first.release()
    assert read_lease(tmp_path / "new") is not None
    second.release()
    assert not (tmp_path / "new").exists()  # made for the lease, and nothing was written
