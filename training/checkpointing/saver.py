"""Saving off the critical path: a snapshot in host memory, written, sealed and published in the background.

The loop waits for the snapshot only. Every rank writes its own files; when the loop's own sums say that all
have, which costs it no wait, rank 0 seals and publishes. At most one save is in flight. An error on any rank
is raised on all of them, at the next step.
"""

from __future__ import annotations

import hashlib
import os
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
from gsa.weights import WEIGHTS, save_weights
from training.engine.engine import Engine
from training.engine.snapshot import HostBuffers, Snapshot
from training.engine.world import World


@dataclass(frozen=True)
class Retention:
    """keep_last: newest checkpoints that stay; None: all. keep_every: multiples of it stay for ever."""

    keep_last: int | None
    keep_every: int | None


BEAT_S = 5.0
"""How often a rank that waits for a save gives a sign of life: a disk may take longer than a watchdog's patience."""


@dataclass(frozen=True)
class SaveReport:
    """stall_s: the loop stood still. background_s: from then to publication. background_cpu_s: of rank 0's writer.

    removed: older checkpoints, some perhaps with the error that kept them.
    """

    tag: str
    step: int
    bytes: int
    stall_s: float
    background_s: float
    background_cpu_s: float
    removed: list[Removed]


class _Job(threading.Thread):
    """A call in the background, whose result or error is asked for later. Dies with the process."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._call, self.result, self.error, self.cpu_s = call, None, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as err:  # raised by the loop, on all ranks
            self.error = err
        self.cpu_s = time.thread_time()


@dataclass
class _InFlight:
    state: RunState
    job: _Job
    sealing: bool = False
    outcome: str = "was not saved"
    """What is true of the checkpoint if an error ends its save now."""
    stall_s: float = 0.0
    cpu_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)


class Saver:
    """All methods are called by every rank at the same step; none but `start` and `finish` waits for anything.

    background: False writes before `start` returns. bytes_needed: what the first save is expected to take.
    published: told of every checkpoint that has come to exist, on rank 0. beat: called now and then while waiting.
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
        refused = self._world.broadcast(self._prepare(self._dir / tag) if self._world.is_main else None)
        if refused is not None:
            raise CheckpointError(refused)
        snapshot = self._engine.snapshot(self._dir, tag, state.to_dict(), buffers=self._buffers)
        self._flight = _InFlight(state, _Job(lambda: _write(snapshot, state.config, self._dir / tag)))
        if self._buffers is None:
            self.finish(stall_since=began)
        else:
            self._flight.stall_s = time.perf_counter() - began

    def flags(self) -> tuple[float, float]:
        """(settled, failed), each 0 or 1, of this rank: to be summed over ranks and given to `advance`."""
        job = None if self._flight is None else self._flight.job
        if job is None or job.is_alive():
            return float(job is None), 0.0
        return 1.0, float(job.error is not None)

    def advance(self, settled: float, failed: float) -> None:
        """Takes the save in flight one phase on, once every rank is through with the last one.

        Raises CheckpointError on all ranks when any has failed.
        """
        if self._flight is not None and (failed or settled == self._world.size):
            self._next_phase()

    def finish(self, *, stall_since: float | None = None) -> None:
        """Waits until the save in flight, if any, is published. Raises CheckpointError on all ranks if it fails."""
        while self._flight is not None:
            self._next_phase(stall_since)

    def _prepare(self, step_dir: Path) -> str | None:
        try:
            manifest.clear_torn(step_dir)
            manifest.require_space(self._dir, self._bytes_needed)
        except (CheckpointError, OSError) as err:  # the other ranks wait for the answer
            return str(err)
        return None

    def _settled(self, flight: _InFlight) -> list[tuple[dict | None, str | None, str]]:
        """Waits until every rank's job is done; (files written, what went wrong, outcome) of each.

        In rounds, with a sign of life in each: no rank sits in one collective for as long as another's disk takes.
        """
        while True:
            job = flight.job
            job.join(timeout=BEAT_S)
            self._beat()
            done = not job.is_alive()
            written = job.result if done and not flight.sealing else None
            shared = self._world.gather((written, _words(job.error), flight.outcome) if done else None)
            if None not in shared:
                return shared

    def _next_phase(self, stall_since: float | None = None) -> None:
        flight = self._flight
        shared = self._settled(flight)
        flight.cpu_s += flight.job.cpu_s
        tag = f"step_{flight.state.step}"
        failed = [f"rank {rank}: {words}" for rank, (_, words, _) in enumerate(shared) if words is not None]
        if failed:
            self._flight = None
            outcome = shared[0][2]  # of rank 0, which seals
            raise CheckpointError(f"{tag} {outcome}:\n  " + "\n  ".join(failed)) from flight.job.error
        if not flight.sealing:
            hashes = {name: entry for part, *_ in shared for name, entry in part.items()}
            flight.sealing = True
            flight.job = _Job(lambda: self._seal(flight, hashes) if self._world.is_main else None)
            return
        self._flight = None
        if self._world.is_main:
            size, removed = flight.job.result
            self._bytes_needed = size
            now = time.perf_counter()
            stall_s = flight.stall_s if stall_since is None else now - stall_since
            background_s = 0.0 if stall_since is not None else now - flight.since
            self._published(SaveReport(tag, flight.state.step, size, stall_s, background_s, flight.cpu_s, removed))

    def _seal(self, flight: _InFlight, hashes: dict[str, tuple[int, str]]) -> tuple[int, list[Removed]]:
        tag = f"step_{flight.state.step}"
        sealed = manifest.seal(self._dir / tag, hashes=hashes)
        flight.outcome = "was saved, and `auto` finds it, but `latest` could not be set to it"
        manifest.publish(self._dir, tag)
        flight.outcome = "was saved, and older ones stay, since reading it back failed"
        removed: list[Removed] = []
        if self._retention.keep_last is not None:
            # one thread: what is read back here must not take the loop's cores
            removed = manifest.retain(self._dir, self._retention.keep_last, self._retention.keep_every, threads=1)
        return sum(entry.bytes for entry in sealed.files.values()), removed


def _words(error: Exception | None) -> str | None:
    return None if error is None else str(error) if isinstance(error, CheckpointError) else repr(error)


def _write(snapshot: Snapshot, config: dict, step_dir: Path) -> dict[str, tuple[int, str]]:
    """This rank's files; {name: (bytes, sha256)}."""
    hashes = {path.name: write_file(path, content) for path, content in snapshot.files.items()}
    if snapshot.weights is not None:
        save_weights(snapshot.weights, config, step_dir)
        for name in (WEIGHTS, CONFIG):
            hashes[name] = ((step_dir / name).stat().st_size, manifest.sha256_of(step_dir / name))
    return hashes


class _HashingFile:
    """A file being written whose size and sha256 are known when it is closed, without reading it again."""

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
    temporary = path.with_name(f"{path.name}.tmp")
    with manifest.writing(path):
        with open(temporary, "wb") as raw:
            file = _HashingFile(raw)
            torch.save(content, file)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    return file.bytes, file.sha256
