"""Runs the `deepspeed` launcher as a child process: signals to its ranks, left-over processes, true exit code."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import psutil

from gsa.files import read_small_file
from gsa.units import MIB
from training.config.command import snake_case_flags
from training.config.signals import STOP_SIGNALS

FORWARDED = (*STOP_SIGNALS, signal.SIGHUP)
"""Signals that are passed on to the ranks."""
AS_SIGTERM = (signal.SIGINT, signal.SIGHUP)
"""Signals that are passed on as SIGTERM: Ctrl-C, and the end of the terminal."""
ORPHAN_GRACE_S = 5.0
"""Seconds from SIGTERM to SIGKILL for processes that the launcher has left behind."""
POLL_S = 1.0
DEFAULT_HOSTFILE = Path("/job/hostfile")
"""The launcher reads it when it is given no other."""


class Launch:
    """The launcher's process and its ranks. ended_by: the signal that ended it before there were ranks, or 0."""

    def __init__(self) -> None:
        self.ended_by = 0
        self._launcher: subprocess.Popen | None = None
        self._ranks_seen = False

    @property
    def session(self) -> int:
        return self._launcher.pid

    def start(self, command: list[str]) -> None:
        """Starts the launcher in a new session, to which all its processes belong."""
        self._launcher = subprocess.Popen(command, start_new_session=True)
        if self.ended_by:
            self._launcher.terminate()

    def wait(self) -> int:
        """Waits for the launcher to end, and returns its exit code."""
        while not self._ranks_seen:
            try:
                return self._launcher.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                self._ranks_seen = self._ranks_seen or bool(ranks(self.session))
        return self._launcher.wait()

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: passes the signal on to the ranks. Before there are any, it ends the launcher."""
        # not to the launcher, which on SIGTERM would kill the ranks one after another
        found = [] if self._launcher is None else ranks(self.session)
        self._ranks_seen = self._ranks_seen or bool(found)
        for process in found:
            _try(lambda process=process: process.send_signal(signal.SIGTERM if number in AS_SIGTERM else number))
        if not self._ranks_seen:  # there is no training to save yet
            self.ended_by = number
            if self._launcher is not None:
                self._launcher.terminate()


SEVERAL_HOSTS = ("--hostfile", "-H", "--include", "-i", "--exclude", "-e", "--num_nodes", "--launcher", "--master_addr")
"""Options with which the ranks may be on several hosts, where nobody knows which port is free."""


def with_free_port(argv: Sequence[str]) -> list[str]:
    """The launcher's arguments with a port that is free now, unless they name one or may mean several hosts."""
    options = {word.partition("=")[0] for word in itertools.takewhile(lambda word: not word.endswith(".py"), argv)}
    if options & {"--master_port", *SEVERAL_HOSTS} or DEFAULT_HOSTFILE.exists():
        return list(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ["--master_port", str(probe.getsockname()[1]), *argv]


def ranks(session: int) -> list[psutil.Process]:
    """The training processes of a session: those with RANK in their environment whose parent has none."""
    found: dict[int, tuple[psutil.Process, int]] = {}
    for process in psutil.process_iter():
        try:
            if _session(process.pid) == session and "RANK" in process.environ():
                found[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):
            continue
    return [process for process, parent in found.values() if parent not in found]


def _session(pid: int) -> int:
    # the fields after the command name, which ends at the last bracket: state, ppid, pgrp, session
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def end_session(session: int) -> int:
    """Ends every process that the launcher has left behind; returns how many of them were ranks."""
    orphans = len(ranks(session))
    for end in (psutil.Process.terminate, psutil.Process.kill):  # the second round also ends what was started meanwhile
        left = [process for process in psutil.process_iter() if _belongs(process, session)]
        for process in left:
            _try(lambda process=process, end=end: end(process))
        psutil.wait_procs(left, timeout=ORPHAN_GRACE_S)
    return orphans


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        return _session(process.pid) == session
    except OSError:
        return False


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return


def output_dir(argv: list[str]) -> Path | None:
    """The run's folder, from the arguments of training/train.py; None where they have none."""
    argv = snake_case_flags(argv)  # as train.py reads them
    for i, word in enumerate(argv):
        if word == "--output_dir" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--output_dir="):
            return Path(word.partition("=")[2])
    return None


def true_code(code: int, orphans: int, folder: Path | None) -> int:
    """The exit code of the ranks, from that of the launcher; 128 + s when signal s ended one.

    The launcher returns 256 - s for a rank that signal s killed. It returns 0 when its own process that watches the
    ranks was killed: then ranks are left behind, or the status in run.json is still "running". orphans: how many ranks
    were left behind. folder: the run's, where it is known.
    """
    if code == 0:
        unfinished = folder is not None and (folder / "run.json").exists() and _status(folder) == "running"
        return 1 if orphans or unfinished else 0
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 255 - 65 else code


def _status(folder: Path) -> str:
    try:
        return json.loads(read_small_file(folder / "run.json", 16 * MIB))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "running"  # a run that ends normally leaves a complete file
