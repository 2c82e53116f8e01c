"""Starts ranks with the `deepspeed` launcher, and tells the truth about how they ended.

    python -m training.launch --num_gpus 4 training/train.py --config ... --output_dir ...

The launcher alone leaves its ranks running when it is sent SIGTERM, and returns 0 when its child is killed.
Here it runs in a session of its own; SIGTERM, SIGUSR1, and Ctrl-C as SIGTERM, go to the ranks themselves, which
save at the next step boundary and exit (a second signal ends them at once); and nothing outlives this process.
The exit code is that of the ranks: as in training/train.py, or 128 + the signal that killed one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ORPHAN_GRACE_S = 5.0


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    launcher = subprocess.Popen([str(Path(sys.executable).with_name("deepspeed")), *argv], start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        # only the ranks: the launcher's own answer to SIGTERM is to kill them one after another
        for process in ranks(launcher.pid):
            try:
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
            except psutil.NoSuchProcess:
                continue

    for number in FORWARDED:
        signal.signal(number, forward)
    code = launcher.wait()
    orphans = end_session(launcher.pid)
    return true_code(code, orphans, output_dir(argv))


def ranks(session: int) -> list[psutil.Process]:
    """The training processes of a session: those with a RANK, started by none that has one."""
    found = {}
    for process in psutil.process_iter():
        try:
            if _session(process.pid) == session and "RANK" in process.environ():
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    return [process for process in found.values() if process.ppid() not in found]


def _session(pid: int) -> int:
    # fields after the command's closing bracket: state, ppid, pgrp, session
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def end_session(session: int) -> int:
    """Ends every process the launcher left behind, and returns how many ranks were among them."""
    orphans = ranks(session)
    left = [p for p in psutil.process_iter() if _belongs(p, session)]
    for process in left:
        _try(process.terminate)
    _, stubborn = psutil.wait_procs(left, timeout=ORPHAN_GRACE_S)
    for process in stubborn:
        _try(process.kill)
    return len(orphans)


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        return _session(process.pid) == session
    except OSError:
        return False


def _try(action) -> None:
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
    return json.loads((folder / "run.json").read_text())["status"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
