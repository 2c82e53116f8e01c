"""Starts ranks with the `deepspeed` launcher, and tells the truth about how they ended.

    python -m training.launch --num_gpus 4 training/train.py --config ... --output_dir ...

The launcher alone leaves its ranks running when it is sent SIGTERM, and returns 0 when its child is killed.
Here it runs in a session of its own; SIGTERM, SIGUSR1, and Ctrl-C or a lost terminal as SIGTERM, go to the ranks
themselves, which save at the next step boundary and exit (a second signal ends them at once); before there are
ranks, a signal ends the launch. Nothing outlives this process. The exit code is that of the ranks: as in
training/train.py, or 128 + the signal that killed one, or that came before there was one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
AS_SIGTERM = (signal.SIGINT, signal.SIGHUP)
ORPHAN_GRACE_S = 5.0
POLL_S = 1.0


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    launch = _Launch()
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, launch.forward)
    launch.start([str(Path(sys.executable).with_name("deepspeed")), *argv])
    code = launch.wait()
    orphans = end_session(launch.session)
    if launch.ended_by and code != 0:
        return 128 + launch.ended_by
    return true_code(code, orphans, output_dir(argv))


class _Launch:
    """The launcher and its ranks. ended_by: a signal that came before there were any, or 0."""

    def __init__(self) -> None:
        self.ended_by = 0
        self._launcher: subprocess.Popen | None = None
        self._ranks_seen = False

    @property
    def session(self) -> int:
        return self._launcher.pid

    def start(self, command: list[str]) -> None:
        self._launcher = subprocess.Popen(command, start_new_session=True)
        if self.ended_by:
            self._launcher.terminate()

    def wait(self) -> int:
        while not self._ranks_seen:
            try:
                return self._launcher.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                self._ranks_seen = self._ranks_seen or bool(ranks(self.session))
        return self._launcher.wait()

    def forward(self, number: int, frame: FrameType | None) -> None:
        # only the ranks: the launcher's own answer to SIGTERM is to kill them one after another
        found = [] if self._launcher is None else ranks(self.session)
        self._ranks_seen = self._ranks_seen or bool(found)
        for process in found:
            _try(lambda process=process: process.send_signal(signal.SIGTERM if number in AS_SIGTERM else number))
        if not self._ranks_seen:  # nothing has been trained that could be saved
            self.ended_by = number
            if self._launcher is not None:
                self._launcher.terminate()


def ranks(session: int) -> list[psutil.Process]:
    """The training processes of a session: those with a RANK, started by none that has one."""
    found: dict[int, tuple[psutil.Process, int]] = {}
    for process in psutil.process_iter():
        try:
            if _session(process.pid) == session and "RANK" in process.environ():
                found[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):
            continue
    return [process for process, parent in found.values() if parent not in found]


def _session(pid: int) -> int:
    # fields after the command's closing bracket: state, ppid, pgrp, session
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def end_session(session: int) -> int:
    """Ends every process the launcher left behind, and returns how many ranks were among them."""
    orphans = len(ranks(session))
    for end in (psutil.Process.terminate, psutil.Process.kill):  # also what was started meanwhile
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
    """The run's folder, as training/train.py was told it."""
    for i, word in enumerate(argv):
        if word == "--output_dir" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--output_dir="):
            return Path(word.partition("=")[2])
    return None


def true_code(code: int, orphans: int, folder: Path | None) -> int:
    """What the ranks ended with, given the launcher's word for it.

    The launcher folds a signal -s into 256 - s, and says 0 when the process that watched the ranks was
    killed: then ranks were left over, or run.json still says "running".
    """
    if code == 0:
        unfinished = folder is not None and (folder / "run.json").exists() and _status(folder) == "running"
        return 1 if orphans or unfinished else 0
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 255 - 65 else code


def _status(folder: Path) -> str:
    try:
        return json.loads((folder / "run.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "running"  # a run that ends in order leaves a whole file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
