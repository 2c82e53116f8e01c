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

An error on any rank in any phase reaches all ranks at the next `poll` or `finish`. It ends no run: the step counts as
not saved, what was written of it is removed, and the next save tries again. `save_last` alone raises it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError, Removed
from gsa.checkpoint.state import CONFIG, TOKENIZER, RunState
from gsa.files import write_atomically
from gsa.units import size_text
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
            f"saved {self.tag}: {size_text(self.bytes)}, training stood still for {self.stall_s:.2f} s, "
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
    output_dir: Path
    task: _Task
    sealing: bool = False
    good: bool = False
    """Whether the checkpoint is sealed, and nothing is known to be wrong with it."""
    outcome: str = "was not saved"
    """What is true of the checkpoint if an error ends its save now."""
    stall_s: float = 0.0
    cpu_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    @property
    def tag(self) -> str:
        return f"step_{self.state.step}"

    @property
    def step_dir(self) -> Path:
        return self.output_dir / self.tag


class Saver:
    """All methods are called by every rank at the same step; `poll` alone waits for nothing.

    background: False writes before `start` returns. bytes_needed: the expected size of the first save. saved_at: the
    step whose checkpoint is in output_dir already, or -1. tokenizer: the content of tokenizer.json, if there is one, of
    which every checkpoint gets a copy. published: called on rank 0 with every checkpoint once it
    exists. failed: called on every rank with the step and the reason of each save that failed, `save_last` apart.
    beat: called now and then while waiting, as a sign of life.
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
        failed: Callable[[int, str], None],
        saved_at: int = -1,
        tokenizer: bytes | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._world, self._dir = engine, world, output_dir
        self._failed, self._tokenizer = failed, tokenizer
        self.saved_at = saved_at
        """The step that was saved last, or whose save is in flight; -1: none, or the last one failed."""
        self._buffers = HostBuffers(pin=world.device.type == "cuda") if background else None
        self._retention, self._bytes_needed, self._published, self._beat = retention, bytes_needed, published, beat
        self._flight: _InFlight | None = None

    def start(self, state: RunState) -> None:
        """Begins the save of the state after `state.step` steps, once the last save has ended."""
        began = time.perf_counter()
        self.finish()
        with self._going_on(state.step):
            self._begin(state, self._dir)
            if self._buffers is None:
                self._end(stall_since=began)
            else:
                self._flight.stall_s = time.perf_counter() - began

    def save_last(self, state: RunState, emergency_dir: str | None) -> None:
        """Saves the state that the run ends with, and waits for it.

        Raises CheckpointError on all ranks when that fails. emergency_dir: a folder, best on another disk, in which a
        copy is saved then, in a folder of the run's own; the message says where, or why that failed too.
        """
        began = time.perf_counter()
        self.finish()
        try:
            self._begin(state, self._dir)
            self._end(stall_since=began)
        except CheckpointError as err:
            self._abandon()
            if self.saved_at == state.step:
                self._failed(state.step, str(err))
                return
            if emergency_dir is None:
                raise
            raise CheckpointError(f"{err}\n{self._rescue(state, Path(emergency_dir))}") from err

    def _rescue(self, state: RunState, emergency_dir: Path) -> str:
        """Saves into the emergency folder, and says where the checkpoint lies and what to do with it."""
        folder = emergency_dir / f"{self._dir.resolve().name}_{state.tracking_id}"
        try:
            self._world.from_main(lambda: _make_folder(folder))
            self._begin(state, folder)
            self._end()
        except CheckpointError as err:
            self._abandon()
            return f"It could not be saved in training.emergency_dir either: {err}"
        return (
            f"Nothing is lost: {folder / f'step_{state.step}'} holds it. Mend the disk, copy that folder to "
            f"{self._dir}, then --resume_from auto"
        )

    def _begin(self, state: RunState, output_dir: Path) -> None:
        tag = f"step_{state.step}"
        refused = self._world.from_main(lambda: self._refusal(output_dir, tag))
        if refused is not None:
            raise CheckpointError(refused)
        snapshot = self._engine.snapshot(output_dir, tag, state.to_dict(), buffers=self._buffers)
        task = _Task(lambda: _write(snapshot, state.config, output_dir / tag, self._tokenizer))
        self._flight, self.saved_at = _InFlight(state, output_dir, task), state.step

    @contextmanager
    def _going_on(self, step: int) -> Iterator[None]:
        """Reports a CheckpointError of its block, which is raised on all ranks, instead of raising it."""
        try:
            yield
        except CheckpointError as err:
            self._abandon()
            self._failed(step, str(err))

    def _abandon(self) -> None:
        """The save in flight has failed: unless it is good, it counts as not saved and gives its room back."""
        flight, self._flight = self._flight, None
        if flight is not None and flight.good:
            return
        self.saved_at = -1
        if flight is not None and self._world.is_main:
            with suppress(CheckpointError, OSError):  # the disk may refuse this as well
                manifest.clear_torn(flight.step_dir)

    def status(self) -> tuple[float, float]:
        """(done, failed) of this rank's task, each 0 or 1: to be summed over ranks and given to `poll`."""
        task = None if self._flight is None else self._flight.task
        if task is None or task.is_alive():
            return float(task is None), 0.0
        return 1.0, float(task.error is not None)

    def poll(self, done: float, failed: float) -> None:
        """Begins the next phase of the save in flight once every rank is done with this one, or any has failed.

        done, failed: `status`, summed over ranks.
        """
        if self._flight is not None and (failed or done == self._world.size):
            with self._going_on(self._flight.state.step):
                self._end_phase()

    def finish(self) -> None:
        """Waits until the save in flight, if any, is published or has failed."""
        if self._flight is not None:
            with self._going_on(self._flight.state.step):
                self._end()

    def _end(self, *, stall_since: float | None = None) -> None:
        """Waits until the save in flight is published. Raises CheckpointError on all ranks if it fails."""
        while self._flight is not None:
            self._end_phase(stall_since)

    def _refusal(self, output_dir: Path, tag: str) -> str | None:
        """Removes what an interrupted save left; why nothing can be saved there, or None."""
        try:
            manifest.clear_torn(output_dir / tag)
            manifest.require_space(output_dir, self._bytes_needed)
        except (CheckpointError, OSError) as err:  # the other ranks wait for the answer
            return str(err)
        return None

    def _wait_for_all(self, flight: _InFlight) -> list[tuple[dict | None, str | None, str, bool]]:
        """Waits until every rank's task is done; (files written, error, outcome, good) of each.

        It waits in rounds, with a sign of life in each: no rank sits in one collective for as long as another's disk
        takes.
        """
        while True:
            task = flight.task
            task.join(timeout=BEAT_S)
            self._beat()
            done = not task.is_alive()
            written = task.result if done and not flight.sealing else None
            shared = self._world.gather(
                (written, _error_text(task.error), flight.outcome, flight.good) if done else None
            )
            if None not in shared:
                return shared

    def _end_phase(self, stall_since: float | None = None) -> None:
        """Ends the phase of the save in flight on all ranks: raises its errors, seals after writing, or reports."""
        flight = self._flight
        shared = self._wait_for_all(flight)
        flight.cpu_s += flight.task.cpu_s
        failed = [f"rank {rank}: {text}" for rank, (_, text, *_) in enumerate(shared) if text is not None]
        if failed:
            _, _, outcome, flight.good = shared[0]  # rank 0 seals
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
        sealed = manifest.seal(flight.step_dir, hashes=hashes)
        flight.good = True
        flight.outcome = "was saved, and `auto` finds it, but `latest` could not be set to it"
        manifest.publish(flight.output_dir, flight.tag)
        flight.good = False
        flight.outcome = "was saved, and older ones stay, since reading it back failed"
        removed: list[Removed] = []
        if self._retention.keep_last is not None:
            # one thread: reading it back must not take the loop's cores
            removed = manifest.retain(
                flight.output_dir, self._retention.keep_last, self._retention.keep_every, threads=1
            )
        return sum(entry.bytes for entry in sealed.files.values()), removed


def _make_folder(path: Path) -> None:
    with manifest.writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _error_text(error: Exception | None) -> str | None:
    return None if error is None else str(error) if isinstance(error, CheckpointError) else repr(error)


def _write(snapshot: Snapshot, config: dict, step_dir: Path, tokenizer: bytes | None) -> dict[str, tuple[int, str]]:
    """Writes this rank's files; returns {name: (bytes, sha256)}."""
    hashes = {path.name: write_file(path, content) for path, content in snapshot.files.items()}
    if snapshot.weights is not None:
        save_weights(snapshot.weights, config, step_dir)
        if tokenizer is not None:
            manifest.write_durably(step_dir / TOKENIZER, tokenizer)
        for name in (WEIGHTS, CONFIG, *([TOKENIZER] if tokenizer is not None else [])):
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
