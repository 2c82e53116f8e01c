"""Saves off the critical path: a snapshot in host memory, then written, sealed and published in the background.

One save, from `start` to its checkpoint. At most one is in flight; a new one first waits for the old one.

    snapshot              all ranks, in the loop: copies the state into host memory; the loop waits for nothing else
       |
    writing               every rank's writer thread: its own files, each whole or not at all, hashed while written
       |
    written by all        `poll` sees it in the sums over ranks that each step makes anyway; nobody waits for it
       |
    sealing               rank 0's thread: manifest.json over all files and hashes, written last
       |
    sealed                from here on `--resume_from auto` finds the checkpoint
       |
    published             rank 0's thread: `latest` names it, older ones are deleted; then the loop reports it

An error on any rank in any phase is raised on all ranks, at the next `poll` or `finish`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError, Removed
from gsa.checkpoint.state import CONFIG, RunState
from gsa.files import write_atomically
from gsa.units import MIB
from gsa.weights import WEIGHTS, save_weights
from training.engine.engine import Engine
from training.engine.snapshot import HostBuffers, Snapshot
from training.engine.world import World


@dataclass(frozen=True)
class Retention:
    """keep_last: how many of the newest checkpoints stay; None: all. keep_every: multiples of it stay as well."""

    keep_last: int | None
    keep_every: int | None


BEAT_S = 5.0
"""Seconds between signs of life of a rank that waits for a save: a disk may take longer than the watchdog waits."""


@dataclass(frozen=True)
class SaveReport:
    """A checkpoint that exists. stall_s: how long the loop stood still. background_s: from then to publication.

    background_cpu_s: processor time of rank 0's writer. removed: older checkpoints, some perhaps with the error that
    kept them from being deleted.
    """

    tag: str
    step: int
    bytes: int
    stall_s: float
    background_s: float
    background_cpu_s: float
    removed: list[Removed]

    def event(self) -> dict:
        """The "save" event."""
        return {
            "event": "save",
            "step": self.step,
            "tag": self.tag,
            "bytes": self.bytes,
            "save_stall_seconds": self.stall_s,
            "save_background_seconds": self.background_s,
            "save_background_cpu_seconds": self.background_cpu_s,
        }

    def lines(self) -> list[str]:
        """What the console prints of it."""
        saved = (
            f"saved {self.tag}: {self.bytes / MIB:.1f} MiB, training stood still for {self.stall_s:.2f} s, "
            f"written in {self.stall_s + self.background_s:.2f} s"
        )
        return [saved, *map(str, self.removed)]


class _Task(threading.Thread):
    """A call in the background, whose result or error is read later. It ends with the process."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._call, self.result, self.error, self.cpu_s = call, None, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as err:  # the loop raises it, on all ranks
            self.error = err
        self.cpu_s = time.thread_time()


@dataclass
class _InFlight:
    state: RunState
    task: _Task
    sealing: bool = False
    outcome: str = "was not saved"
    """What is true of the checkpoint if an error ends its save now."""
    stall_s: float = 0.0
    cpu_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    @property
    def tag(self) -> str:
        return f"step_{self.state.step}"


class Saver:
    """All methods are called by every rank at the same step; only `start` and `finish` wait for anything.

    background: False writes before `start` returns. bytes_needed: the expected size of the first save. published:
    called on rank 0 with every checkpoint once it exists. beat: called now and then while waiting, as a sign of life.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        output_dir: Path,
        *,
        background: bool,
        retention: Retention,
        bytes_needed: int,
        published: Callable[[SaveReport], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._world, self._dir = engine, world, output_dir
        self._buffers = HostBuffers(pin=world.device.type == "cuda") if background else None
        self._retention, self._bytes_needed, self._published, self._beat = retention, bytes_needed, published, beat
        self._flight: _InFlight | None = None

    def start(self, state: RunState) -> None:
        """Begins the save of the state after `state.step` steps.

        Raises CheckpointError on all ranks when the last save failed, the disk has no room, or the tag is taken.
        """
        began = time.perf_counter()
        self.finish()
        tag = f"step_{state.step}"
        refused = self._world.from_main(lambda: self._refusal(self._dir / tag))
        if refused is not None:
            raise CheckpointError(refused)
        snapshot = self._engine.snapshot(self._dir, tag, state.to_dict(), buffers=self._buffers)
        self._flight = _InFlight(state, _Task(lambda: _write(snapshot, state.config, self._dir / tag)))
        if self._buffers is None:
            self.finish(stall_since=began)
        else:
            self._flight.stall_s = time.perf_counter() - began

    def status(self) -> tuple[float, float]:
        """(done, failed) of this rank's task, each 0 or 1: to be summed over ranks and given to `poll`."""
        task = None if self._flight is None else self._flight.task
        if task is None or task.is_alive():
            return float(task is None), 0.0
        return 1.0, float(task.error is not None)

    def poll(self, done: float, failed: float) -> None:
        """Begins the next phase of the save in flight once every rank is done with this one.

        done, failed: `status`, summed over ranks. Raises CheckpointError on all ranks when any has failed.
        """
        if self._flight is not None and (failed or done == self._world.size):
            self._end_phase()

    def finish(self, *, stall_since: float | None = None) -> None:
        """Waits until the save in flight, if any, is published. Raises CheckpointError on all ranks if it fails."""
        while self._flight is not None:
            self._end_phase(stall_since)

    def newest_good(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is good, or None, and a line for each that was passed over."""
        return self._world.from_main(lambda: manifest.newest_good(self._dir))

    def _refusal(self, step_dir: Path) -> str | None:
        """Removes what an interrupted save left at step_dir; why nothing can be saved there, or None."""
        try:
            manifest.clear_torn(step_dir)
            manifest.require_space(self._dir, self._bytes_needed)
        except (CheckpointError, OSError) as err:  # the other ranks wait for the answer
            return str(err)
        return None

    def _wait_for_all(self, flight: _InFlight) -> list[tuple[dict | None, str | None, str]]:
        """Waits until every rank's task is done; (files written, error, outcome) of each.

        It waits in rounds, with a sign of life in each: no rank sits in one collective for as long as another's disk
        takes.
        """
        while True:
            task = flight.task
            task.join(timeout=BEAT_S)
            self._beat()
            done = not task.is_alive()
            written = task.result if done and not flight.sealing else None
            shared = self._world.gather((written, _error_text(task.error), flight.outcome) if done else None)
            if None not in shared:
                return shared

    def _end_phase(self, stall_since: float | None = None) -> None:
        """Ends the phase of the save in flight on all ranks: raises its errors, seals after writing, or reports."""
        flight = self._flight
        shared = self._wait_for_all(flight)
        flight.cpu_s += flight.task.cpu_s
        failed = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(shared) if text is not None]
        if failed:
            self._flight = None
            outcome = shared[0][2]  # of rank 0, which seals
            raise CheckpointError(f"{flight.tag} {outcome}:\n  " + "\n  ".join(failed)) from flight.task.error
        if not flight.sealing:
            hashes = {name: entry for part, *_ in shared for name, entry in part.items()}
            flight.sealing = True
            flight.task = _Task(lambda: self._seal_and_publish(flight, hashes) if self._world.is_main else None)
            return
        self._flight = None
        if self._world.is_main:
            size, removed = flight.task.result
            self._bytes_needed = size
            now = time.perf_counter()
            stall_s = flight.stall_s if stall_since is None else now - stall_since
            background_s = 0.0 if stall_since is not None else now - flight.since
            self._published(
                SaveReport(flight.tag, flight.state.step, size, stall_s, background_s, flight.cpu_s, removed)
            )

    def _seal_and_publish(self, flight: _InFlight, hashes: dict[str, tuple[int, str]]) -> tuple[int, list[Removed]]:
        sealed = manifest.seal(self._dir / flight.tag, hashes=hashes)
        flight.outcome = "was saved, and `auto` finds it, but `latest` could not be set to it"
        manifest.publish(self._dir, flight.tag)
        flight.outcome = "was saved, and older ones stay, since reading it back failed"
        removed: list[Removed] = []
        if self._retention.keep_last is not None:
            # one thread: reading it back must not take the loop's cores
            removed = manifest.retain(self._dir, self._retention.keep_last, self._retention.keep_every, threads=1)
        return sum(entry.bytes for entry in sealed.files.values()), removed


def _error_text(error: Exception | None) -> str | None:
    return None if error is None else str(error) if isinstance(error, CheckpointError) else repr(error)


def _write(snapshot: Snapshot, config: dict, step_dir: Path) -> dict[str, tuple[int, str]]:
    """Writes this rank's files; returns {name: (bytes, sha256)}."""
    hashes = {path.name: write_file(path, content) for path, content in snapshot.files.items()}
    if snapshot.weights is not None:
        save_weights(snapshot.weights, config, step_dir)
        for name in (WEIGHTS, CONFIG):
            hashes[name] = ((step_dir / name).stat().st_size, manifest.sha256_of(step_dir / name))
    return hashes


class _HashingFile:
    """A file being written; its size and sha256 are known when it is closed, without reading it again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()


def write_file(path: Path, content: object) -> tuple[int, str]:
    """torch.save, whole or not at all; returns (bytes, sha256). Raises CheckpointError when the disk refuses."""
    with manifest.writing(path), write_atomically(path, durable=True) as raw:
        file = _HashingFile(raw)
        torch.save(content, file)
    return file.bytes, file.sha256
