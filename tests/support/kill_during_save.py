"""Kills a save at every possible moment, in forked children without a launcher, with the state of a real engine.

kill_during_save.py YAML RUN OUT: RUN has a checkpoint step_3. A first process resumes a copy of RUN to step 4. Instead of
saving, it forks one writer per moment. Writer n saves into OUT/<n>/, a copy of RUN, and kills itself just before its n-th
change to step_4 or `latest`, or with half of a file written. If it leaves a torn checkpoint, a second writer saves over
it and is killed at the same count. OUT/<n>.json records the outcome. Then some of the folders are resumed by "auto":
every eighth, and every third of those without a torn checkpoint. OUT/calm/ is a run without any kill.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # imported here once, before the forks: the first engine of a process needs seconds for it
import torch.utils.cpp_extension

import gsa.weights
from gsa.checkpoint import manifest
from gsa.checkpoint.state import RunState
from gsa.files import write_atomically
from training.checkpointing import saver as saving
from training.engine import engine  # noqa: F401  imported once, before the forks
from training.engine.snapshot import Snapshot
from training.engine.world import World
from training.loop import trainer  # noqa: F401
from training.train import main


class Alone(World):
    """A world without a process group, whose threads a forked child does not have."""

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]


class Canned:
    """Replaces the engine: returns the snapshot that it took, for any folder."""

    def __init__(self, snapshot: Snapshot, tokenizer: bytes | None) -> None:
        self._taken, self.tokenizer = snapshot, tokenizer

    def snapshot(self, output_dir: Path, tag: str, client_state: dict, *, buffers: object) -> Snapshot:
        (output_dir / tag).mkdir(parents=True, exist_ok=True)  # as DeepSpeed does
        files = {output_dir / tag / path.name: content for path, content in self._taken.files.items()}
        return Snapshot(files, self._taken.weights)


def kill_at(number: int, diary: Path) -> None:
    """Makes this process kill itself at its `number`-th change to step_4 or latest; writes that moment to `diary`."""
    left = number

    def moment(words: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            diary.write_text(words)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = Path(os.fsdecode(args[0])) if not isinstance(args[0], int) else Path()
            if "step_4" in path.parts or path.name.startswith("latest"):
                moment(f"before {event} of {path.name}")

    write, save_file = saving._HashingFile.write, gsa.weights.save_file

    def write_by_halves(self, data):
        if len(data) > 1000 and not hasattr(self, "halved"):  # once per file, with half of a tensor written
            self.halved = True
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            moment(f"inside {Path(self._file.name).stem}")
            self._file.seek(-(len(data) // 2), os.SEEK_CUR)
        return write(self, data)

    def save_file_by_halves(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)
        moment(f"inside {path.stem}")
        save_file(tensors, path, metadata=metadata)

    class Halves:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            moment(f"inside {Path(self._file.name).stem}")
            return self._file.write(data[len(data) // 2 :])

    @contextmanager
    def write_atomically_by_halves(path, **how):
        with write_atomically(path, **how) as file:
            yield Halves(file)

    saving._HashingFile.write = write_by_halves
    gsa.weights.save_file = save_file_by_halves
    manifest.write_atomically = write_atomically_by_halves  # manifest.json, config.json and latest
    sys.addaudithook(audit)


def forked(call: Callable[[], int]) -> int:
    """Runs `call` in a forked child, which exits with its result. Returns the exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(call())
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_to_step_4(yaml: str, folder: Path, resume: str) -> int:
    """Resumes a run and trains it to step 4; returns the exit code."""
    torch.set_num_threads(1)
    return main(
        [
            "--config",
            yaml,
            "--output_dir",
            str(folder),
            "--resume_from",
            resume,
            "training.max_steps=6",
            "training.stop_at_step=4",
            "training.eval_interval=0",
            "training.keep_last=null",
        ]
    )


def save(canned: Canned, state: RunState, folder: Path) -> int:
    world = Alone(0, 1, 0, 1, torch.device("cpu"))
    saver = saving.Saver(
        canned,
        world,
        folder,
        background=True,
        retention=saving.Retention(None, None),
        bytes_needed=0,
        published=lambda report: None,
        failed=lambda step, reason: None,
        tokenizer=canned.tokenizer,
    )
    saver.start(state)
    saver.finish()
    return 0


def kill_every_moment(source: Path, out: Path, canned: Canned, state: RunState) -> None:
    for number in itertools.count():
        folder = out / str(number)
        shutil.copytree(source, folder)

        def killed(folder=folder, number=number) -> int:
            kill_at(number, out / f"{number}.txt")
            return save(canned, state, folder)

        ended = [forked(killed)]
        if ended[0] != 0 and (folder / "step_4").exists() and not (folder / "step_4" / "manifest.json").exists():
            moment = (out / f"{number}.txt").read_text()
            ended.append(forked(killed))  # it begins by removing the torn checkpoint
            (out / f"{number}.txt").write_text(moment)
        found, passed_over = manifest.newest_good(folder)
        facts = {
            "ended": ended,
            "found": found and found.name,
            "passed_over": passed_over,
            "latest": manifest.latest_tag(folder),
            "moment": ended[0] and (out / f"{number}.txt").read_text(),
            "torn": (folder / "step_4").exists() and not (folder / "step_4" / "manifest.json").exists(),
        }
        (out / f"{number}.json").write_text(json.dumps(facts))
        if ended[0] == 0:
            return


def run(yaml: str, source: Path, out: Path) -> None:
    def kills_instead_of_saving() -> int:
        real_start = saving.Saver.start

        def start(self: saving.Saver, state: RunState) -> None:
            saving.Saver.start = real_start
            taken = self._engine.snapshot(self._dir, f"step_{state.step}", state.to_dict(), buffers=self._buffers)
            kill_every_moment(source, out, Canned(taken, self._tokenizer), state)
            os._exit(0)

        saving.Saver.start = start
        return train_to_step_4(yaml, out / "maker", "step_3")

    shutil.copytree(source, out / "maker")
    shutil.copytree(source, out / "calm")
    if forked(kills_instead_of_saving):
        sys.exit("the run that kills its saves failed")

    def resumed(path: Path) -> None:
        facts, number = json.loads(path.read_text()), int(path.stem)
        chosen = number % 8 == 0 or (number % 3 == 1 and not facts["torn"])  # a resume cannot tell them apart
        facts["resumed"] = forked(lambda: train_to_step_4(yaml, out / path.stem, "auto")) if chosen else None
        path.write_text(json.dumps(facts))

    with ThreadPoolExecutor(2) as pool:  # this machine has two cores
        calm = pool.submit(lambda: forked(lambda: train_to_step_4(yaml, out / "calm", "step_3")))
        list(pool.map(resumed, sorted(out.glob("*.json"))))
        if calm.result():
            sys.exit("the run without a kill failed")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
