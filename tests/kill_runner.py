"""Forks a life of a run for every moment of its save, and kills each there: no launcher, the real engine.

kill_runner.py YAML RUN OUT: RUN has step_3. OUT/<n>/ is a copy of it, resumed to step 4 and killed at its n-th
change to step_4 or `latest` (the last one is not killed); every sixth is killed there twice. Then OUT/<n>.json is
written with what stands; every sixth, and those that were not left torn, are resumed by "auto" to step 4.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # what the first engine of a process imports: half of a short life, once for all of them here
import torch.utils.cpp_extension

from gsa.checkpoint import manifest
from training import engine, saving, trainer  # noqa: F401  imported once, before the forks
from training.train import main


def kill_at(number: int) -> None:
    """This process dies just before its change of this number to step_4 or latest, or inside a file being written."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = Path(os.fsdecode(args[0])) if not isinstance(args[0], int) else Path()
            if "step_4" in path.parts or path.name.startswith("latest"):
                count()

    write = saving._HashingFile.write
    middle = {"seen": False}

    def half(self, data):
        if len(data) > 1000 and not middle["seen"]:  # inside each process once, with half of a tensor written
            middle["seen"] = True
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            count()
            self._file.seek(-(len(data) // 2), os.SEEK_CUR)
        return write(self, data)

    saving._HashingFile.write = half
    sys.addaudithook(audit)


def life(yaml: str, folder: Path, resume: str, number: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            if number is not None:
                kill_at(number)
            os._exit(main(["--config", yaml, "--output_dir", str(folder), "--resume_from", resume, "training.max_steps=6",
                           "training.stop_at_step=4", "training.eval_interval=0", "training.keep_last=null"]))  # fmt: skip
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(yaml: str, source: Path, out: Path) -> None:
    """Two lives at a time: this machine has two cores."""
    for first in itertools.count(step=2):
        pids = {}
        for number in (first, first + 1):
            pids[number] = os.fork()
            if pids[number] == 0:
                try:
                    os._exit(3 if one(number, yaml, source, out) else 0)
                finally:
                    os._exit(99)
        codes = {number: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for number, pid in pids.items()}
        if not set(codes.values()) <= {0, 3}:
            sys.exit(f"kill point(s) failed: {codes}")
        if 3 in codes.values():
            if codes[first] == 3:  # its neighbour was not killed either
                (out / f"{first + 1}.json").unlink()
            return


def one(number: int, yaml: str, source: Path, out: Path) -> bool:
    """Kills at this point, writes what stands; whether there was nothing left to kill."""
    folder = out / str(number)
    shutil.copytree(source, folder)
    ended = [life(yaml, folder, "step_3", number)]
    if number % 6 == 0 and ended[0] == -signal.SIGKILL and not (folder / "step_4" / "manifest.json").exists():
        ended.append(life(yaml, folder, "step_3", number))
    found, passed_over = manifest.newest_good(folder)
    facts = {
        "ended": ended, "found": found and found.name, "passed_over": passed_over, "latest": manifest.latest_tag(folder),
        "torn": (folder / "step_4").exists() and not (folder / "step_4" / "manifest.json").exists(),
    }  # fmt: skip
    # torn folders are alike to a resume: every sixth of them, and whatever is not torn
    facts["resumed"] = life(yaml, folder, "auto", None) if number % 6 == 0 or not facts["torn"] else None
    (out / f"{number}.json").write_text(json.dumps(facts))
    return ended[-1] == 0


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
